"""What the commands and the studies can be told."""
