"""What an operator reads and orders: clients, lag, dead letters, read offsets, and what weakens a guarantee."""
