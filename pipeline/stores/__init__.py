"""Where a partition's state is kept: one module per kind of store, `registry` chooses."""
