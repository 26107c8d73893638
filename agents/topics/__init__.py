"""Parts of the agents that own topics: message storage, plans, deduplication, due times, user commands, state cache."""
