"""The command line of the caller's side."""
