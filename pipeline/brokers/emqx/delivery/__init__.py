"""Deliveries to the clients of an EMQX: windows, copies, and what processes of one bridge tell each other."""
