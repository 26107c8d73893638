"""Commands from the agents to a broker: the bridge reads them from Kafka, carries them out and reports them."""
