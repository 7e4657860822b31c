"""Reports: the results of a run, or of several side by side, as one self-contained HTML page and as Markdown."""
