"""What is done: everything that awaits Kafka, Redis or an MQTT broker."""
