"""`millpond rebuild`: an agent's state rebuilt from the log, in its own store."""
