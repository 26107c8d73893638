"""A long-running process: its event loop, its signals, its readiness and its log."""
