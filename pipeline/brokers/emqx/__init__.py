"""The bridge of an EMQX: what its hooks tell, into Kafka; deliveries, through its REST API."""
