"""Deliveries to the clients of an EMQX: delivery windows, copies, and notes between the processes of one bridge."""
