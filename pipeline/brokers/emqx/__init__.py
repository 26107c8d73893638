"""The two bridges of EMQX: one uses its hooks and REST API, one reads the rule events that it writes to Kafka."""
