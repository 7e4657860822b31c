"""Python processes that do for this one what may crash or must run beside it: how they start, and how they ended."""

from __future__ import annotations

import os
import signal
import sys


def child_environment(**changes: str) -> dict[str, str]:
    """Return the environment of a Python process that imports what this one does, with some variables changed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **changes}


def how_it_ended(returncode: int) -> str:
    """Describe a return code of `subprocess`.

    >>> how_it_ended(-11), how_it_ended(1)
    ('SIGSEGV', 'exit code 1')
    """
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"
