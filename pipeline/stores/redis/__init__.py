"""The Redis store: a single server, Sentinel or a Cluster."""
