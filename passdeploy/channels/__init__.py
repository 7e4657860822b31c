"""Channels followed through a real forward pass, and the groups in which they can be cut."""
