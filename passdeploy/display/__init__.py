"""Everything a person reads in a terminal: progress lines, tables, quantities with their units."""
