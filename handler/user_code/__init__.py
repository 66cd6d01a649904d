"""Runs the functions of the handler's team, with inputs of their types, in threads of their own."""
