"""Kafka clients: the producer, the group consumer, the driver's log, the administration of topics."""
