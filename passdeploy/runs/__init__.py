"""The run folder: the only place where results are written, and how they are read back."""
