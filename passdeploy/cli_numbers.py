"""Numbers on the command line: finite ones, and how many threads there may be."""

from __future__ import annotations

from math import isfinite
from typing import Any

import click

MOST_THREADS = 4096  # more than any machine has; libraries end the program where they cannot start as many


class FiniteRange(click.FloatRange):
    """Numbers of a range that are finite: `nan` is in no range, and click takes it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert a text, and refuse what is not finite."""
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number
