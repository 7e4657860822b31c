"""Dense training and fine-tuning: one loop, its losses, optimisers, evaluation and saved state."""
