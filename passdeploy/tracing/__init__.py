"""One forward pass in which every operation is recorded and every channel carries a label."""
