"""The chaos run: its schedule, its faults and its verdict."""
