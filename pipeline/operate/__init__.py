"""What an operator does and reads: dead letters, rewinds, clients, lag, warnings about the configuration."""
