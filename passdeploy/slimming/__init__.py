"""A network without the channels that a plan drops, the masked network it must equal, and the comparison."""
