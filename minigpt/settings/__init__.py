"""Settings of the commands and the studies."""
