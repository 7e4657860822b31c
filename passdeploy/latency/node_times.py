"""Times of the nodes of a network as parts of a call, from traces in which every node takes a little longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from passdeploy.latency.layer_model import non_negative_least_squares
from passdeploy.latency.network_model import robust_slope
from passdeploy.latency.network_timing import NetworkTiming
from passdeploy.profiling.kernel_times import NodeTime


def node_times(names: Sequence[str], timings: Sequence[NetworkTiming]) -> np.ndarray:
    """Spread the time of each untraced call over the nodes of the dense network, shape (nodes, networks)."""
    row = {name: number for number, name in enumerate(names)}
    times = np.zeros((len(row), len(timings)))
    scale, extra = _untraced(timings)
    for number, timing in enumerate(timings):
        pending = 0.0  # ms of nodes that the dense network lacks (changes of layout); added to the next node
        for node in timing.nodes:
            if node.name in row:
                times[row[node.name], number] += max(scale * node.ms + extra, 0.0) + pending
                pending = 0.0
            else:
                pending += max(scale * node.ms + extra, 0.0)
        times[-1, number] += pending
        times[:, number] *= timing.total_ms / times[:, number].sum()
    return times


def estimate_calls(timings: Sequence[NetworkTiming]) -> list[NetworkTiming]:
    """Estimate the calls of which only the nodes were timed, and convert all nodes to parts of a call.

    The nodes were timed in another backend, operator by operator. Convolutions and products run there in the same
    libraries; the operators between them are fused here, into them or into each other. So a call takes a constant, a
    multiple of the former and another multiple of the latter, which are fitted to the calls that were timed.
    """
    sums = np.array([[_weighted_ms(timing), sum(node.ms for node in timing.nodes), 1.0] for timing in timings])
    sums[:, 1] -= sums[:, 0]
    total = np.array([timing.total_ms for timing in timings])
    timed = ~np.isnan(total)
    factors = non_negative_least_squares(sums[timed] / total[timed, None], np.ones(timed.sum()))
    calls = np.where(timed, total, np.maximum(sums @ factors, 1e-6))
    converted = []
    for timing, call in zip(timings, calls.tolist(), strict=True):
        rest = factors[2] / len(timing.nodes)
        nodes = tuple(
            replace(node, ms=rest + factors[0 if _has_weight(node) else 1] * node.ms) for node in timing.nodes
        )
        converted.append(replace(timing, total_ms=call, nodes=nodes))
    return converted


def _weighted_ms(timing: NetworkTiming) -> float:
    """Add up the milliseconds of the nodes with a weight."""
    return sum(node.ms for node in timing.nodes if _has_weight(node))


def _has_weight(node: NodeTime) -> bool:
    """Test whether a node is a convolution or a product of matrices."""
    return any(word in node.kind for word in ("conv", "linear", "addmm", "matmul", "bmm"))


def _untraced(timings: Sequence[NetworkTiming]) -> tuple[float, float]:
    """Fit the factor and the addend that turn a node's traced milliseconds into its part of an untraced call.

    Tracing adds time to every node, and misses the time between nodes; both are proportional to the number of nodes.
    The line through (mean node, total / nodes) of all networks is fitted robustly against disturbed measurements.
    """
    mean = np.array([sum(node.ms for node in timing.nodes) / len(timing.nodes) for timing in timings])
    total = np.array([timing.total_ms / len(timing.nodes) for timing in timings])
    scale = float(np.clip(robust_slope(mean, total), 0.5, 2.0)) if len(timings) > 2 else float(np.median(total / mean))
    return scale, float(np.median(total - scale * mean))
