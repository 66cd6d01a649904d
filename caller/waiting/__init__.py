"""The waiting activity of a call: its attempts, its renewals, and its cancellation."""
