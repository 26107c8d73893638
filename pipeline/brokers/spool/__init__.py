"""A durable producer: events go to Kafka, or to the spool on disk while Kafka does not answer."""
