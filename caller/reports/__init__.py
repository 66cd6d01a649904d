"""What people read about the caller's calls, from Temporal alone."""
