"""The example: an order team and a payment team."""
