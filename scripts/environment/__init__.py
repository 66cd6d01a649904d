"""The Temporal server and the processes that demo, tests, benchmark and chaos run against."""
