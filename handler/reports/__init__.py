"""What people and metrics read about deliveries and runs, from Temporal alone."""
