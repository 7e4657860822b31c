"""The channel tracer: one forward pass that records every operation and propagates a label for every channel."""
