"""What a running process needs without HTTP or Temporal: settings, files that change, logs, metrics and traces."""
