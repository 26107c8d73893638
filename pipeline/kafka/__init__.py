"""Kafka clients: the producer, the consumer, the driver's log, the topics."""
