"""The command line of both sides."""
