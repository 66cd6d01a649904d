"""Temporal, as a process uses it: the connection, raw calls, and the parts of both worker plugins."""
