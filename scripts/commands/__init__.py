"""The commands that the one-word scripts run."""
