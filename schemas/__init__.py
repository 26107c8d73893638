"""What is true: events, commands, rules, keys and errors. This package does no IO and reads no clock."""
