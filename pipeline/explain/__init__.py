"""Seeing inside: where a message is, how deep a topic, read from Kafka and Redis; as plain data, for whoever shows it."""
