"""Stores: where a partition's state is kept. Each kind has a package; `registry` chooses one for a pool."""
