"""Commands of the agents to a broker: read from Kafka, tracked, and reported."""
