"""`millpond web`: the web page with its API and its MQTT console. The page loads nothing from elsewhere."""
