"""Texts and labelled rows into tokens and batches."""
