"""Chance as a function of a key: the same key, the same numbers, whatever ran before.

A generator that runs through a whole job makes its state part of every result. Here each draw gets a
fresh generator, seeded from names and numbers such as ("order", seed, epoch), so that a resumed run,
another number of workers or an extra evaluation changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*key: str | int) -> int:
    """A 63-bit seed for `key`; keys that differ anywhere give unrelated seeds.

    >>> seed_of("order", 0, 1) == seed_of("order", 0, 1), seed_of("order", 0, 1) == seed_of("order", 1, 0)
    (True, False)
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: str | int) -> torch.Generator:
    """A generator on the CPU, seeded from `key`."""
    return torch.Generator().manual_seed(seed_of(*key))


@contextmanager
def seeded_global_generators(*key: str | int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of the CPU and of `device` from `key`, and put them back afterwards.

    For code that draws from nowhere else: dropout, stochastic depth.
    """
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        torch.default_generator.manual_seed(seed_of(*key))
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed_of(*key))
        yield
