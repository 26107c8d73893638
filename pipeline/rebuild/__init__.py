"""`millpond rebuild`: an agent's state made again from the log, in its own store."""
