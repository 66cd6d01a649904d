"""What `scripts/scale` and `scripts/soak` read of a running stack, what they compute from it, and how they show it."""
