"""Latency as a function of widths: measured inside whole networks, predicted per layer, planned for, and checked."""
