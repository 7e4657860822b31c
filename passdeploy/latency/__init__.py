"""Latency of a network as a function of its widths: measure tables, predict, plan for a latency, and verify plans."""
