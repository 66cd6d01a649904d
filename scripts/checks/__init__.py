"""Checks of our own, which no well-kept tool has."""
