"""Run folders: writing results into a run, and loading networks and reports from it."""
