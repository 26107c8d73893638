"""A store in memory, for simulations and tests."""
