"""`millpond up`: everything a newcomer needs, as child processes on one machine."""
