"""Channel groups of a network: gathered from one traced forward pass, then checked by trial cuts."""
