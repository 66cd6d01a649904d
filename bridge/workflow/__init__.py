"""What workflow code imports: client, operations that a handler serves, progress. Deterministic, without I/O."""
