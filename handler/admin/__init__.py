"""The handler's command line."""
