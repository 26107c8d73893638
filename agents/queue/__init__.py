"""The queue agent: one message, one consumer, the ack deletes it."""
