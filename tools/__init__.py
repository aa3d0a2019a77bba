"""Recipes of the bundled assets, generators of documentation."""
