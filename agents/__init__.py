"""What Millpond decides: one pure machine for each agent, and the driver that runs all of them."""
