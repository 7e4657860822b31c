"""Tables of `benchmarks.torch_trt`."""

from __future__ import annotations

from typing import Any


def markdown(document: dict[str, Any]) -> str:
    return "\n"
