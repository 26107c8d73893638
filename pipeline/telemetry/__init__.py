"""Metrics, health and traces of a process. Nothing here changes what the process does."""
