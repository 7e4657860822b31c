"""Pruning in the trainer that a network has: one function for the whole road, slim networks in files, and adapters."""
