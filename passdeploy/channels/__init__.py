"""Channel groups, their costs, and pruning plans: plain values without a network."""
