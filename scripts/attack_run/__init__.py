"""What attacks the services in `scripts/attack`, and the example with the parts that a bad peer needs."""
