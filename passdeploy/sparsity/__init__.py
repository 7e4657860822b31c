"""Channel importance: PASS (Huang et al., arXiv:2407.17412) and the baselines that it is compared with."""
