"""A whole system whose servers fail, under load: `make test-failover`."""
