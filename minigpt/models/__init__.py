"""The models, and the parts they are built from."""
