"""The sessions agent: who is online, who is subscribed to what, and who is to be told."""
