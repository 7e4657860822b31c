"""What is the same whoever cuts: how much goes, how it is timed, what counts as uncut."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

SHARE = 0.5  # of every group's channels that goes
TIMED, TIMED_S = 3, 10.0  # how often work is timed, while it has taken less than so many CPU seconds in all

Say = Callable[[Mapping[str, Any]], None]  # tells the parent process what is known by now
Result = TypeVar("Result")


def timed(work: Callable[..., Result], *prepare: Callable[[], Any]) -> tuple[Result, float]:
    """What work on what was prepared for it comes to, and the CPU seconds of the fastest time."""
    found: list[float] = []
    while len(found) < TIMED and sum(found) < TIMED_S:
        prepared = [make() for make in prepare]
        start = time.process_time()
        result = work(*prepared)
        found.append(time.process_time() - start)
    return result, min(found)


def uncut_layers(dense: nn.Module, smaller: nn.Module, touched: set[str] | None) -> tuple[int, list[str]]:
    """How many convolutions and linear layers there are, and those whose weights kept their shape."""
    after = dict(smaller.named_modules())
    names = [
        name
        for name, module in dense.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and (touched is None or name in touched)
    ]
    modules = dict(dense.named_modules())
    return len(names), [name for name in names if modules[name].weight.shape == after[name].weight.shape]  # type: ignore[union-attr]


def first_line(error: BaseException) -> str:
    """The error and the line of code that raised it, short."""
    lines = str(error).strip().splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" [{Path(frames[-1].filename).name}:{frames[-1].lineno}]" if frames else ""
    return f"{type(error).__name__}: {lines[0][:160]}{where}"
