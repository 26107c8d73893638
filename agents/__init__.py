"""What is decided: one pure machine per agent, and the driver that runs them all."""
