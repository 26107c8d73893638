"""An MQTT 3.1.1 broker in the bridge's own process, for development and tests: sessions live in memory."""
