"""Networks by name, with their weights; copying them, running them, and the visual prompt in front of them."""
