"""The side effects: everything that awaits Kafka, Redis or an MQTT broker, and the command line."""
