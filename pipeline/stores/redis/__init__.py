"""State in Redis: a single server, Sentinel or a Cluster."""
