"""The durable producer: it sends events to Kafka, or stores them on disk while Kafka does not answer."""
