"""How far clocks may differ: one value for message signatures and callback tokens, on both sides."""

from datetime import timedelta

CLOCK_SKEW = timedelta(minutes=5)
"""Accepted difference between the clock of a signer or minter and that of a verifier, in both directions."""
