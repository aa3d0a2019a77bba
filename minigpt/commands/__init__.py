"""The `minigpt` command."""
