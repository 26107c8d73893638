"""Bridges: one folder for each kind of MQTT broker, and the parts that they share."""
