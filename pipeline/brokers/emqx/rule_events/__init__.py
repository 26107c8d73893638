"""The bridge `emqx-kafka`: it reads the rule events that EMQX writes to Kafka."""
