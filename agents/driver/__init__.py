"""The driver: the one asynchronous runtime of all machines. It loads, steps, commits and produces."""
