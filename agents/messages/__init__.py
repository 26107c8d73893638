"""The messages agent: it stores the messages of every topic without a delivery rule."""
