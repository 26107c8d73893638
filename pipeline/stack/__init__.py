"""`millpond up`: Kafka, Redis, a bridge, the workers and the web page, as child processes on one machine."""
