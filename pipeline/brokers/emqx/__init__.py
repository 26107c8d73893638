"""The bridges of an EMQX: what its hooks, or its rules, tell, into Kafka; deliveries, through its REST API."""
