"""The pubsub agent: one log for each topic, every subscriber its own read offset."""
