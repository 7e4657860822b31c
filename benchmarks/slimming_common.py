"""Shared parts of the slimming benchmark for both libraries: share to cut, timing, count of uncut layers."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

SHARE = 0.5  # of the channels of every group to remove
TIMED, TIMED_S = 3, 10.0  # work is timed this often, unless it has taken more CPU seconds in all

Report = Callable[[Mapping[str, Any]], None]  # sends results to the parent process
Result = TypeVar("Result")


def timed(work: Callable[..., Result], *prepare: Callable[[], Any]) -> tuple[Result, float]:
    """Run `work` on what the functions in `prepare` return, up to three times.

    Returns:
        The last result, and the CPU seconds of the fastest time.
    """
    seconds: list[float] = []
    while len(seconds) < TIMED and sum(seconds) < TIMED_S:
        prepared = [make() for make in prepare]
        start = time.process_time()
        result = work(*prepared)
        seconds.append(time.process_time() - start)
    return result, min(seconds)


def uncut_layers(dense: nn.Module, smaller: nn.Module, touched: set[str] | None) -> tuple[int, list[str]]:
    """Return the number of convolutions and linear layers, and the names of those whose weights kept their shape."""
    after = dict(smaller.named_modules())
    names = [
        name
        for name, module in dense.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and (touched is None or name in touched)
    ]
    modules = dict(dense.named_modules())
    return len(names), [name for name in names if modules[name].weight.shape == after[name].weight.shape]  # type: ignore[union-attr]


def error_summary(error: BaseException) -> str:
    """Return the class and the first line of an error, and the line of code that raised it."""
    lines = str(error).strip().splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" [{Path(frames[-1].filename).name}:{frames[-1].lineno}]" if frames else ""
    return f"{type(error).__name__}: {lines[0][:160]}{where}"
