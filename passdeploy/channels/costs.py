"""Cost models: multiply-adds, parameters, channels and latency as functions of group widths.

Each count is a sum of products: the multiply-adds of a convolution are its output pixels times its kernel size times
its input channels times its output channels, and each number of channels is a fixed part plus whole multiples of group
widths. So the exact cost of a plan takes microseconds, and no network is rebuilt.

A block that may be skipped is one more such size, 1 or 0, and every product inside it has it as a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import numpy as np

from passdeploy.channels.blocks import Block, presence


@dataclass(frozen=True)
class Factor:
    """Size of one dimension: `fixed` plus, for every group in it, its width times its span."""

    fixed: int
    spans: tuple[tuple[str, int], ...]

    def size(self, widths: Mapping[str, int]) -> int:
        """Compute the size at the given widths."""
        return self.fixed + sum(span * widths[name] for name, span in self.spans)


class Cost(Protocol):
    """Cost as a function of widths, in any unit."""

    def value(self, widths: np.ndarray) -> int:
        """Compute the cost at `widths`, shape (groups,)."""
        ...

    def gradient(self, widths: np.ndarray) -> np.ndarray:
        """Compute the cost of one more channel of each group, shape (groups,)."""
        ...


class SteppedCost(Cost, Protocol):
    """Cost that grows in steps, and may fall where a group gets wider, so that a gradient says little."""

    def curve(self, widths: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """Compute what depends on a group at each of its `candidates`, while others stay; shape (candidates,)."""
        ...


@dataclass(frozen=True)
class Term:
    """A part of a count that is proportional to some sizes."""

    total: int  # at full width
    factors: Sequence[Factor]
    place: str  # the module, parameter or group that it counts


@dataclass(frozen=True, eq=False)
class Polynomial:
    """Sum of products of sizes, with value and gradient for vectors of widths."""

    unit: np.ndarray  # (terms,) count where every factor is 1
    fixed: np.ndarray  # (terms, factors)
    spans: np.ndarray  # (terms, factors, groups)

    @classmethod
    def build(cls, widths: Mapping[str, int], terms: Sequence[Term]) -> Polynomial:
        """Add up the terms that are proportional to the same factors."""
        merged: dict[tuple[Factor, ...], int] = {}
        for term in terms:
            variable = tuple(factor for factor in term.factors if factor.spans)
            product = prod(factor.size(widths) for factor in variable)
            if term.total % product:
                raise AssertionError(f"a count of {term.total} is no multiple of its dimensions {product}")
            merged[variable] = merged.get(variable, 0) + term.total // product
        column = {name: number for number, name in enumerate(widths)}
        most = max((len(factors) for factors in merged), default=0)
        fixed = np.ones((len(merged), most), np.int64)
        spans = np.zeros((len(merged), most, len(widths)), np.int64)
        for row, factors in enumerate(merged):
            for position, factor in enumerate(factors):
                fixed[row, position] = factor.fixed
                for name, span in factor.spans:
                    spans[row, position, column[name]] = span
        return cls(np.array(list(merged.values()), np.int64), fixed, spans)

    def value(self, widths: np.ndarray) -> int:
        """Compute the count at `widths`, shape (groups,)."""
        return int((self.unit * (self.fixed + self.spans @ widths).prod(1)).sum())

    def gradient(self, widths: np.ndarray) -> np.ndarray:
        """Compute the cost of one more channel of each group, to first order; shape (groups,)."""
        sizes = (self.fixed + self.spans @ widths).astype(float)  # (terms, factors)
        total = np.zeros(self.spans.shape[2])
        for position in range(sizes.shape[1]):
            others = np.delete(sizes, position, axis=1).prod(1) * self.unit  # (terms,)
            total += others @ self.spans[:, position]
        return total


@dataclass(frozen=True, eq=False)
class CostModel:
    """Multiply-adds, parameters, channels and, where a table was measured, latency as functions of group widths.

    Attributes:
        widths: name of a group -> its width in the dense network, in order; then `presence` of every block that may be
            skipped -> 1.
        blocks: the blocks that may be skipped.
    """

    widths: Mapping[str, int]
    macs: Polynomial
    params: Polynomial
    channels: Polynomial
    latency: SteppedCost | None = None  # nanoseconds of a batch, from a table
    blocks: tuple[Block, ...] = ()

    @classmethod
    def build(
        cls,
        widths: Mapping[str, int],
        *,
        macs: Sequence[Term],
        params: Sequence[Term],
        channels: Sequence[Term],
        blocks: Sequence[Block] = (),
    ) -> CostModel:
        """Build the polynomials from terms at full width.

        Args:
            widths: of the groups, in order.
            macs: the places of these terms are modules.
            params: their places are parameters.
            channels: their places are groups.
            blocks: of the network; those that must stay count like the rest of it.
        """
        prunable = tuple(block for block in blocks if block.is_prunable)
        sizes = {**widths, **{presence(block.name): 1 for block in prunable}}

        def polynomial(terms: Sequence[Term], is_in: Callable[[Block, str], bool]) -> Polynomial:
            around = {
                place: [Factor(0, ((presence(block.name), 1),)) for block in prunable if is_in(block, place)]
                for place in {term.place for term in terms}
            }
            return Polynomial.build(
                sizes, [replace(term, factors=(*term.factors, *around[term.place])) for term in terms]
            )

        return cls(
            sizes,
            macs=polynomial(macs, Block.holds),
            params=polynomial(params, lambda block, tensor: tensor in block.tensors),
            channels=polynomial(channels, lambda block, group: group in block.groups),
            blocks=prunable,
        )

    def vector(self, widths: Mapping[str, int]) -> np.ndarray:
        """Convert widths by group to a vector, shape (sizes,); what is not named is as in the dense network."""
        return np.array([widths.get(name, full) for name, full in self.widths.items()], np.int64)

    def of(self, kind: str, widths: Mapping[str, int] | None = None) -> int:
        """Compute the count of `kind` (macs, params, channels, latency) at `widths`, by default the dense ones."""
        return self.cost_of(kind).value(self.vector(widths or {}))

    def cost_of(self, kind: str) -> Cost:
        """Return the function of widths that counts `kind`."""
        cost: Cost | None = getattr(self, kind)
        if cost is None:
            raise AssertionError("the cost of latency is known only where a table was measured")
        return cost

    def without_blocks(self) -> CostModel:
        """Return the same costs for plans that skip no block."""
        return replace(self, blocks=())
