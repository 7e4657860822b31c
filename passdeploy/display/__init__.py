"""Terminal output: progress lines, tables, and numbers with their units."""
