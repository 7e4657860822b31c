"""Run code that draws random numbers as if chance had always drawn the same: to compare networks in training mode.

Dropout over fewer channels draws other numbers, by which two networks that compute the same would differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from passdeploy.runtime.seeds import seeded_python_and_numpy

# Arguments by which operations, such as attention and recurrent layers, are told to drop values, and not to.
_DROPPING = {"dropout_p": 0.0, "dropout": 0.0, "train": False, "training": False}

_MOST_DRAWS = 10_000  # of one run


@contextmanager
def without_chance() -> Iterator[None]:
    """Let dropout keep all values, and every other draw of random numbers return the same number in all places.

    What is drawn as zeros and ones (`bernoulli`) is one, other fractions are one half, whole numbers the lowest. Python
    and NumPy draw from a seed. All global generators are afterwards what they were.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with seeded_python_and_numpy(), torch.random.fork_rng(devices=list(gpus)), _ConstantDraws():
        yield


class _ConstantDraws(TorchDispatchMode):
    """The mode in which `without_chance` runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws_left = _MOST_DRAWS

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any operation, one that draws random numbers without them."""
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **given)
        self._draws_left -= 1
        if self._draws_left < 0:  # `while not keep.any(): keep = torch.rand(3) > 0.5` would never end
            raise RuntimeError(f"more than {_MOST_DRAWS} draws of random numbers, which are all the same here")
        given |= {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        if told := given.keys() & _DROPPING.keys():
            return func(**given | {name: _DROPPING[name] for name in told})
        is_kept_or_not = "bernoulli" in func.name()
        lowest = given.get("low", given.get("from", 0))

        def constant(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.fill_(1 if is_kept_or_not else 0.5 if leaf.is_floating_point() else lowest)

        return tree_map(constant, func(**given))
