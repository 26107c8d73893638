"""Inspection: where a message is, and what is known of a topic, read from Kafka and Redis and returned as data."""
