"""What the owners of topics share: message storage, plans, deduplication, due times, user commands, cached states."""
