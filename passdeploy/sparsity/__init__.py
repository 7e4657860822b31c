"""Which channels matter: PASS (Huang et al., arXiv:2407.17412) and the baselines it is compared with."""
