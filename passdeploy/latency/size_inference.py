"""Size inference: express the dimensions of a backend's nodes as functions of group widths.

A backend reports nodes after its own fusions and in its own layouts, without the layers that they come from. But a
dimension is a fixed part plus whole multiples of group widths, and its values in a dozen networks of random widths
leave only one such expression, which is found by trying.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from passdeploy.channels.costs import Factor
from passdeploy.profiling.kernel_times import NodeTime

MOST_SIZES = 2  # that the time of a node is a function of
_COMMON_SPANS = (1, 2, 3, 4, 9, 16, 25, 49)  # tried where sizes are padded to blocks, so that no slope can be computed


class SizeExplainer:
    """Finder of the `Factor` that explains a vector of sizes by group widths, with a cache.

    Args:
        widths: group name -> its width in each of the networks, shape (networks,).
        block: sizes may be rounded up to multiples of this.
    """

    def __init__(self, widths: Mapping[str, np.ndarray], block: int) -> None:
        self._widths = {name: values for name, values in widths.items() if (values != values[0]).any()}
        self._block, self._known = block, dict[bytes, Factor | None]()

    def explain(self, sizes: np.ndarray) -> Factor | None:
        """Find the factor that gives these sizes, shape (networks,); None where there is none."""
        key = sizes.tobytes()
        if key not in self._known:
            self._known[key] = self._linear(sizes) or self._padded(sizes)
        return self._known[key]

    def learn(self, sizes: np.ndarray, factor: Factor) -> None:
        """Cache a factor that was found in another way."""
        self._known[sizes.tobytes()] = factor

    def value(self, factor: Factor) -> np.ndarray:
        """Compute the sizes that a factor gives, shape (networks,)."""
        total = np.asarray(factor.fixed, np.int64)
        for name, span in factor.spans:
            total = total + span * self._widths[name]
        return total

    def _linear(self, sizes: np.ndarray) -> Factor | None:
        """Find a group with sizes = fixed + span * width in every network."""
        for name, widths in self._widths.items():
            low, high = int(widths.argmin()), int(widths.argmax())
            span, remainder = divmod(int(sizes[high] - sizes[low]), int(widths[high] - widths[low]))
            fixed = int(sizes[low]) - span * int(widths[low])
            if span > 0 and not remainder and fixed >= 0 and (sizes == fixed + span * widths).all():
                return Factor(fixed, ((name, span),))
        return None

    def _padded(self, sizes: np.ndarray) -> Factor | None:
        """Find a group with sizes = span * width, rounded up to blocks, in every network."""
        if (sizes % self._block).any():
            return None
        for name, widths in self._widths.items():
            for span in _COMMON_SPANS:
                if (sizes == round_up(span * widths, self._block)).all():
                    return Factor(0, ((name, span),))
        return None


def round_up(sizes: np.ndarray, block: int) -> np.ndarray:
    """Round sizes up to multiples of `block`."""
    padded: np.ndarray = -(-sizes // block) * block
    return padded


def infer_sizes(node: Sequence[NodeTime], explainer: SizeExplainer) -> tuple[str, tuple[Factor, ...]]:
    """Infer the layer signature of a node and those of its sizes that depend on widths.

    Args:
        node: the same node in every network.
        explainer: of these networks.

    Returns:
        A signature, equal for nodes that do the same work at the same sizes (operator, every fixed size, and which of
        the others are equal), and the distinct sizes that depend on widths.
    """
    first, factors, words = node[0], list[Factor](), [node[0].kind]
    if first.sizes is not None:
        return _signature(first), first.sizes
    explained: list[list[Factor | None]] = []
    for index, shape in enumerate(first.shapes):
        dims, row = [], list[Factor | None]()
        for dim in range(len(shape)):
            sizes = np.array([timed.shapes[index][dim] for timed in node], np.int64)
            if (sizes == sizes[0]).all():
                dims.append(str(sizes[0]))
                row.append(Factor(int(sizes[0]), ()))
                continue
            factor = explainer.explain(sizes)
            if factor is None and index >= first.inputs:
                factor = _concatenated(explained, dim, sizes, explainer)
            row.append(factor)
            if factor is None:
                dims.append("?")
                continue
            if factor not in factors:
                factors.append(factor)
            dims.append("abcdefgh"[factors.index(factor)] if len(factors) <= 8 else "*")
        explained.append(row)
        if index == len(first.shapes) - 1 and len(factors) > MOST_SIZES:  # a concatenation takes time by its output
            factors = list(dict.fromkeys(factor for factor in row if factor is not None and factor.spans))[:MOST_SIZES]
        words.append(("x".join(dims) or "scalar") if index < first.inputs else "->" + "x".join(dims))
    return " ".join(words), tuple(factors)


def _signature(node: NodeTime) -> str:
    """Build the signature of a node with known sizes: its operator and all dimensions but those of channels."""
    read = ["x".join(map(str, (*shape[:1], *shape[2:]))) for shape in node.shapes[:1]]
    weight = ["x".join(map(str, shape[2:])) for shape in node.shapes[1:2]]
    written = ["x".join(map(str, (*shape[:1], *shape[2:]))) for shape in node.shapes[node.inputs :]]
    return " ".join([node.kind, *read, "by", *weight, "of", str(len(node.sizes or ())), "->", *written])


def _concatenated(
    inputs: Sequence[Sequence[Factor | None]], dim: int, sizes: np.ndarray, explainer: SizeExplainer
) -> Factor | None:
    """Explain the size of a concatenation as the sum of its inputs' sizes; None where that is not what it is."""
    parts = [row[dim] for row in inputs if dim < len(row)]
    if not parts or any(part is None for part in parts):
        return None
    spans: dict[str, int] = {}
    for part in parts:
        assert part is not None
        for name, span in part.spans:
            spans[name] = spans.get(name, 0) + span
    total = Factor(sum(part.fixed for part in parts if part), tuple(sorted(spans.items())))
    if not (explainer.value(total) == sizes).all():
        return None
    explainer.learn(sizes, total)
    return total
