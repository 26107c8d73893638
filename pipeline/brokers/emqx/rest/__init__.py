"""EMQX's REST API: the client, its responses, and what the bridge reads through it."""
