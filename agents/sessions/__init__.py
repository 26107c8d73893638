"""The sessions agent: connections, sessions and subscriptions of clients, and announcements to the delivery agents."""
