"""What the two delivery agents share: members, windows, leases, reports, work that waits."""
