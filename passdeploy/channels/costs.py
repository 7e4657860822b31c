"""What a network costs as a function of its widths, without rebuilding it.

Every count is a sum of products: the multiply-adds of a convolution are its output pixels times its kernel
times input channels times output channels, and each of these numbers of channels is a fixed part plus
whole multiples of group widths. So a plan is priced in microseconds, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Factor:
    """The size of one dimension: `fixed` plus, for every group in it, its width times its span."""

    fixed: int
    spans: tuple[tuple[str, int], ...]

    def size(self, widths: Mapping[str, int]) -> int:
        """The size at the given widths."""
        return self.fixed + sum(span * widths[name] for name, span in self.spans)


class Cost(Protocol):
    """What widths cost, whatever it is counted in."""

    def value(self, widths: np.ndarray) -> int:
        """The cost at `widths`, shape (groups,)."""
        ...

    def gradient(self, widths: np.ndarray) -> np.ndarray:
        """What one more channel of each group costs, shape (groups,)."""
        ...


Term = tuple[int, Sequence[Factor]]  # the count at full width, and what it is proportional to


@dataclass(frozen=True, eq=False)
class Polynomial:
    """A sum of products of sizes; value and gradient for vectors of widths."""

    unit: np.ndarray  # (terms,) what one unit of every factor costs
    fixed: np.ndarray  # (terms, factors)
    spans: np.ndarray  # (terms, factors, groups)

    @classmethod
    def build(cls, widths: Mapping[str, int], terms: Sequence[Term]) -> Polynomial:
        """Terms that grow with the same factors are added up."""
        merged: dict[tuple[Factor, ...], int] = {}
        for total, factors in terms:
            moving = tuple(factor for factor in factors if factor.spans)
            whole = prod(factor.size(widths) for factor in moving)
            if total % whole:
                raise AssertionError(f"a count of {total} is no multiple of its dimensions {whole}")
            merged[moving] = merged.get(moving, 0) + total // whole
        column = {name: number for number, name in enumerate(widths)}
        most = max((len(factors) for factors in merged), default=0)
        fixed = np.ones((len(merged), most), np.int64)
        spans = np.zeros((len(merged), most, len(widths)), np.int64)
        for row, factors in enumerate(merged):
            for place, factor in enumerate(factors):
                fixed[row, place] = factor.fixed
                for name, span in factor.spans:
                    spans[row, place, column[name]] = span
        return cls(np.array(list(merged.values()), np.int64), fixed, spans)

    def value(self, widths: np.ndarray) -> int:
        """The count at `widths`, shape (groups,)."""
        return int((self.unit * (self.fixed + self.spans @ widths).prod(1)).sum())

    def gradient(self, widths: np.ndarray) -> np.ndarray:
        """What one more channel of each group costs, to first order; shape (groups,)."""
        sizes = (self.fixed + self.spans @ widths).astype(float)  # (terms, factors)
        total = np.zeros(self.spans.shape[2])
        for place in range(sizes.shape[1]):
            others = np.delete(sizes, place, axis=1).prod(1) * self.unit  # (terms,)
            total += others @ self.spans[:, place]
        return total


@dataclass(frozen=True, eq=False)
class CostModel:
    """Multiply-adds, parameters, channels and, once it was measured, latency at any widths of a network's groups."""

    widths: Mapping[str, int]  # group name -> width of the dense network, in order
    macs: Polynomial
    params: Polynomial
    channels: Polynomial
    latency: Cost | None = None  # nanoseconds of a batch, from a table

    @classmethod
    def build(
        cls,
        widths: Mapping[str, int],
        *,
        macs: Sequence[Term],
        params: Sequence[Term],
        channels: Sequence[Term],
    ) -> CostModel:
        """From terms at full width."""
        kinds = {"macs": macs, "params": params, "channels": channels}
        return cls(dict(widths), **{kind: Polynomial.build(widths, terms) for kind, terms in kinds.items()})

    def vector(self, widths: Mapping[str, int]) -> np.ndarray:
        """Widths by group as a vector; groups not named keep their full width."""
        return np.array([widths.get(name, full) for name, full in self.widths.items()], np.int64)

    def of(self, kind: str, widths: Mapping[str, int] | None = None) -> int:
        """The count of `kind` (macs, params, channels, latency) at `widths`, by default those of the dense network."""
        return self.price(kind).value(self.vector(widths or {}))

    def price(self, kind: str) -> Cost:
        """What counts `kind`."""
        price: Cost | None = getattr(self, kind)
        if price is None:
            raise AssertionError("latency is priced only where a table was measured")
        return price
