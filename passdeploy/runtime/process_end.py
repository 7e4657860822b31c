"""How a process ended, in words."""

from __future__ import annotations

import signal


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
