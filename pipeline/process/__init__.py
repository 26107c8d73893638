"""A long-running process: event loop, signals, readiness, log, and the start of child processes."""
