"""Networks: building them by name, loading their weights, copying them, and the visual prompt in front of them."""
