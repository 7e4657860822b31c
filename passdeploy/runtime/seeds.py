"""Seeding: random generators that depend only on a key such as ("order", seed, epoch), not on earlier draws.

With one generator for a whole job, every result would depend on all draws before it. Here each draw has a generator of
its own, so that a resumed run, another number of workers or an extra evaluation does not change any result.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch


def seed_of(*key: str | int) -> int:
    """Compute a 63-bit seed from `key`; keys that differ anywhere give unrelated seeds.

    >>> seed_of("order", 0, 1) == seed_of("order", 0, 1), seed_of("order", 0, 1) == seed_of("order", 1, 0)
    (True, False)
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: str | int) -> torch.Generator:
    """Make a generator on the CPU, seeded from `key`."""
    return torch.Generator().manual_seed(seed_of(*key))


@contextmanager
def seeded_global_generators(*key: str | int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of the CPU and of `device` from `key`, and restore their states afterwards.

    For code that can only draw from the global generators: initial weights, dropout, stochastic depth.
    """
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        torch.default_generator.manual_seed(seed_of(*key))
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed_of(*key))
        yield


@contextmanager
def seeded_python_and_numpy(seed: int = 0, numpy_seed: int | None = None) -> Iterator[None]:
    """Seed the generators of Python and NumPy, from which code of a network may draw, and restore them afterwards."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that others draw from
    random.seed(seed)
    np.random.seed(seed if numpy_seed is None else numpy_seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def states_of_python_and_numpy() -> tuple[Any, ...]:
    """Return the states of the global generators of Python and NumPy, to see whether code draws from them."""
    name, keys, *place = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002 - the one that others draw from
    return random.getstate(), name, keys.tolist(), place
