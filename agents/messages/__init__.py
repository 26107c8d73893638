"""The messages agent: keeps the messages of every topic that no delivery rule claims."""
