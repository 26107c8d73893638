"""State in memory, for simulations and tests."""
