"""Starting targets for callers: the start itself, its identity, cancels, and operations without a workflow."""
