"""The sessions agent: it knows connections, sessions and subscriptions, and announces members to the delivery agents."""
