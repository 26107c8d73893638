"""Adapters: one folder for each kind of MQTT broker."""
