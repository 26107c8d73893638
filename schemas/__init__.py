"""What is true: events, commands, rules, keys and errors. No IO, no clock."""
