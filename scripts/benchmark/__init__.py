"""The benchmark: what it runs, measures and reports."""
