"""From the close of a target to its callers: what notices it, reads the outcome, delivers it, and repeats a delivery."""
