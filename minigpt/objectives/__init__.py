"""Objectives: a batch and a model into a loss."""
