"""The time of a layer as a function of its sizes, from a few dozen measurements.

The backbone is physics: a call, what is read, what is written and what is multiplied each cost something, in blocks of
channels, and none of them less than nothing. What is left (kernels that take four blocks at once, a cache that is full)
is smooth enough to be interpolated: Gaussian process regression of the logarithm of what was measured over the backbone
(Rasmussen and Williams 2006, chapter 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from passdeploy.latency.size_inference import round_up

_REACH = 1.5  # octaves over which what was learned at one size is believed at another
_WANDERS = 0.3  # how far times stray from the backbone, as a logarithm
_SCATTER = 0.05  # and how far measurements stray from each other
_APART = 4.0  # octaves between the kernels for less than a block of channels and the others
_LEAST_MS = 1e-5


@dataclass(frozen=True, eq=False)
class LayerModel:
    """Milliseconds of one kind of layer."""

    block: int
    weights: np.ndarray  # (terms,) of the backbone
    at: np.ndarray  # (samples, sizes) logarithms of the sizes that were measured
    pull: np.ndarray  # (samples,)

    @classmethod
    def fit(cls, sizes: np.ndarray, ms: np.ndarray, block: int) -> LayerModel:
        """From sizes, shape (samples, 0 to 2), and what they took, shape (samples,)."""
        sizes, ms = _pooled(sizes, np.maximum(ms, _LEAST_MS))
        terms = _backbone(sizes, block)
        weights = _non_negative(terms / ms[:, None], np.ones(len(ms)))  # relative errors count
        at = _octaves(sizes, block)
        if not sizes.shape[1]:
            return cls(block, weights, at, np.zeros(len(at)))
        off = np.log(ms / np.maximum(terms @ weights, _LEAST_MS))
        pull = np.linalg.solve(_kernel(at, at) + _SCATTER**2 * np.eye(len(at)), off)
        return cls(block, weights, at, pull)

    def predict(self, sizes: np.ndarray) -> np.ndarray:
        """Milliseconds at sizes of shape (any, 0 to 2)."""
        backbone = np.maximum(_backbone(sizes, self.block) @ self.weights, _LEAST_MS)
        if not sizes.shape[1]:
            return np.asarray(backbone)
        bend: np.ndarray = backbone * np.exp(_kernel(_octaves(sizes, self.block), self.at) @ self.pull)
        return bend


def _backbone(sizes: np.ndarray, block: int) -> np.ndarray:
    """The terms whose weighted sum is the backbone, shape (samples, terms): 1, each size, their product."""
    padded = round_up(sizes, block).astype(float)
    columns = [np.ones(len(sizes)), *padded.T]
    if padded.shape[1] == 2:
        columns.append(padded.prod(1))
    return np.stack(columns, 1)


def _non_negative(terms: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with weights of zero or more; with four terms at most, every choice of them can be tried."""
    best, least = np.zeros(terms.shape[1]), np.inf
    for chosen in product((False, True), repeat=terms.shape[1]):
        mask = np.array(chosen)
        found = np.linalg.lstsq(terms[:, mask], wanted, rcond=None)[0] if mask.any() else np.zeros(0)
        error = float(((terms[:, mask] @ found - wanted) ** 2).sum())
        if error < least and (found >= 0).all():
            best, least = np.zeros(terms.shape[1]), error
            best[mask] = found
    return best


def _octaves(sizes: np.ndarray, block: int) -> np.ndarray:
    """Sizes on the scale on which times are smooth; below one block other kernels run, which are a world apart."""
    octaves: np.ndarray = np.log2(np.maximum(sizes, 1).astype(float)) - _APART * (sizes < block)
    return octaves


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    apart = ((a[:, None] - b[None]) ** 2).sum(-1)
    found: np.ndarray = _WANDERS**2 * np.exp(-0.5 * apart / _REACH**2)
    return found


def _pooled(sizes: np.ndarray, ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measurements at the same sizes as one: their median."""
    if not sizes.shape[1]:
        return sizes[:1], np.array([np.median(ms)])
    distinct, context = np.unique(sizes, axis=0, return_inverse=True)
    return distinct, np.array([np.median(ms[context.ravel() == number]) for number in range(len(distinct))])
