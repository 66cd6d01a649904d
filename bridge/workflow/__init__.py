"""What workflow code imports: the client, the operations that a handler serves, and progress. Deterministic, without I/O."""
