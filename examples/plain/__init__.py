"""Peers without Temporal and without the bridge."""
