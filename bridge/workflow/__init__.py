"""What workflow code imports: the client, operations with their workflows, and progress. Deterministic, without I/O."""
