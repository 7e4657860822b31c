"""Counts of what happens when things go wrong: hostile input, damaged files, failing disks, killed processes."""
