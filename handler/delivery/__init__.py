"""Delivering the outcome of a target to its callers."""
