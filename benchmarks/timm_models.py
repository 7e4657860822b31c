"""Placeholder."""

SMALLEST: tuple[str, ...] = ()
EXTRA: tuple[str, ...] = ()
