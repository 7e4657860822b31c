"""Which widths does a dimension follow? Told from what it was in networks of many widths.

A backend shows nodes of its own making, after fusions and in layouts of its own; how they came about it does not say.
But a dimension is a fixed part plus whole multiples of group widths, and a dozen networks with widths drawn at random
leave one explanation: which is found by trying.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from passdeploy.channels.costs import Factor
from passdeploy.profiling.kernel_times import NodeTime

MOST_SIZES = 2  # that the time of a node is a function of
_OFTEN_SPANNED = (1, 2, 3, 4, 9, 16, 25, 49)  # one channel's places where the layer pads, so no slope can be read off


class Dictionary:
    """Explains vectors of sizes by widths of groups, and remembers.

    Args:
        widths: group name -> its width in each of the networks, shape (networks,).
        block: sizes may be rounded up to multiples of this.
    """

    def __init__(self, widths: Mapping[str, np.ndarray], block: int) -> None:
        self._widths = {name: values for name, values in widths.items() if (values != values[0]).any()}
        self._block, self._known = block, dict[bytes, Factor | None]()

    def explain(self, sizes: np.ndarray) -> Factor | None:
        """What a dimension follows that had these sizes, shape (networks,); None where nothing explains it."""
        key = sizes.tobytes()
        if key not in self._known:
            self._known[key] = self._straight(sizes) or self._padded(sizes)
        return self._known[key]

    def learn(self, sizes: np.ndarray, factor: Factor) -> None:
        """Remember an explanation that was found otherwise."""
        self._known[sizes.tobytes()] = factor

    def value(self, factor: Factor) -> np.ndarray:
        """The sizes that an explanation gives, shape (networks,)."""
        total = np.asarray(factor.fixed, np.int64)
        for name, span in factor.spans:
            total = total + span * self._widths[name]
        return total

    def _straight(self, sizes: np.ndarray) -> Factor | None:
        for name, widths in self._widths.items():
            low, high = int(widths.argmin()), int(widths.argmax())
            span, rest = divmod(int(sizes[high] - sizes[low]), int(widths[high] - widths[low]))
            fixed = int(sizes[low]) - span * int(widths[low])
            if span > 0 and not rest and fixed >= 0 and (sizes == fixed + span * widths).all():
                return Factor(fixed, ((name, span),))
        return None

    def _padded(self, sizes: np.ndarray) -> Factor | None:
        if (sizes % self._block).any():
            return None
        for name, widths in self._widths.items():
            for span in _OFTEN_SPANNED:
                if (sizes == round_up(span * widths, self._block)).all():
                    return Factor(0, ((name, span),))
        return None


def round_up(sizes: np.ndarray, block: int) -> np.ndarray:
    """Sizes as multiples of `block`."""
    padded: np.ndarray = -(-sizes // block) * block
    return padded


def sizes_of(node: Sequence[NodeTime], dictionary: Dictionary) -> tuple[str, tuple[Factor, ...]]:
    """What kind of layer a node is, and which sizes of it follow widths.

    Args:
        node: the same node in every network.
        dictionary: of these networks.

    Returns:
        A signature, equal for nodes that do the same work at the same sizes (operator, every fixed size, and which of
        the others are equal), and the distinct sizes that follow widths.
    """
    first, factors, words = node[0], list[Factor](), [node[0].kind]
    if first.sizes is not None:
        return _signature(first), first.sizes
    explained: list[list[Factor | None]] = []
    for context, shape in enumerate(first.shapes):
        dims, row = [], list[Factor | None]()
        for dim in range(len(shape)):
            sizes = np.array([look.shapes[context][dim] for look in node], np.int64)
            if (sizes == sizes[0]).all():
                dims.append(str(sizes[0]))
                row.append(Factor(int(sizes[0]), ()))
                continue
            factor = dictionary.explain(sizes)
            if factor is None and context >= first.inputs:
                factor = _joined(explained, dim, sizes, dictionary)
            row.append(factor)
            if factor is None:
                dims.append("?")
                continue
            if factor not in factors:
                factors.append(factor)
            dims.append("abcdefgh"[factors.index(factor)] if len(factors) <= 8 else "*")
        explained.append(row)
        if context == len(first.shapes) - 1 and len(factors) > MOST_SIZES:  # a concatenation costs what it writes
            factors = list(dict.fromkeys(factor for factor in row if factor is not None and factor.spans))[:MOST_SIZES]
        words.append(("x".join(dims) or "scalar") if context < first.inputs else "->" + "x".join(dims))
    return " ".join(words), tuple(factors)


def _signature(node: NodeTime) -> str:
    """Of a node that says itself what it follows: all sizes but those of channels."""
    read = ["x".join(map(str, (*shape[:1], *shape[2:]))) for shape in node.shapes[:1]]
    weight = ["x".join(map(str, shape[2:])) for shape in node.shapes[1:2]]
    written = ["x".join(map(str, (*shape[:1], *shape[2:]))) for shape in node.shapes[node.inputs :]]
    return " ".join([node.kind, *read, "by", *weight, "of", str(len(node.sizes or ())), "->", *written])


def _joined(
    inputs: Sequence[Sequence[Factor | None]], dim: int, sizes: np.ndarray, dictionary: Dictionary
) -> Factor | None:
    """A concatenation: as long as its inputs together."""
    parts = [row[dim] for row in inputs if dim < len(row)]
    if not parts or any(part is None for part in parts):
        return None
    spans: dict[str, int] = {}
    for part in parts:
        assert part is not None
        for name, span in part.spans:
            spans[name] = spans.get(name, 0) + span
    found = Factor(sum(part.fixed for part in parts if part), tuple(sorted(spans.items())))
    if not (dictionary.value(found) == sizes).all():
        return None
    dictionary.learn(sizes, found)
    return found
