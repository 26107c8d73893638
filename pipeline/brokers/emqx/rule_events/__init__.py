"""The bridge that reads the rule events which EMQX writes to Kafka."""
