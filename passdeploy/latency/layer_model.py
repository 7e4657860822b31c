"""Layer model: the time of a layer as a function of its sizes, fitted to a few dozen measurements.

The base is linear in a constant, each size and their product (a call, memory traffic, multiply-adds), with sizes in
blocks of channels and weights of zero or more. The remainder (kernels that take four blocks at once, full caches) is
interpolated by Gaussian process regression of log(measured / base) (Rasmussen and Williams 2006, chapter 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from passdeploy.latency.size_inference import round_up

_LENGTH_SCALE = 1.5  # of the Gaussian process, in octaves of size
_SIGNAL_DEVIATION = 0.3  # of log(time / base)
_NOISE_DEVIATION = 0.05  # of log(time) between measurements
_SMALL_KERNEL_OFFSET = 4.0  # octaves between sizes below one block, where other kernels run, and the others
_LEAST_MS = 1e-5


@dataclass(frozen=True, eq=False)
class LayerModel:
    """Milliseconds of one kind of layer as a function of its sizes."""

    block: int
    base_weights: np.ndarray  # (terms,)
    octaves: np.ndarray  # (samples, sizes) logarithms of the measured sizes
    process_weights: np.ndarray  # (samples,)

    @classmethod
    def fit(cls, sizes: np.ndarray, ms: np.ndarray, block: int) -> LayerModel:
        """Fit to sizes, shape (samples, 0 to 2), and their milliseconds, shape (samples,)."""
        sizes, ms = _median_per_size(sizes, np.maximum(ms, _LEAST_MS))
        terms = _base_terms(sizes, block)
        weights = non_negative_least_squares(terms / ms[:, None], np.ones(len(ms)))  # minimises relative errors
        octaves = _octaves(sizes, block)
        if not sizes.shape[1]:
            return cls(block, weights, octaves, np.zeros(len(octaves)))
        residual = np.log(ms / np.maximum(terms @ weights, _LEAST_MS))
        covariance = _covariance(octaves, octaves) + _NOISE_DEVIATION**2 * np.eye(len(octaves))
        return cls(block, weights, octaves, np.linalg.solve(covariance, residual))

    def predict(self, sizes: np.ndarray) -> np.ndarray:
        """Predict milliseconds at sizes of shape (any, 0 to 2)."""
        base = np.maximum(_base_terms(sizes, self.block) @ self.base_weights, _LEAST_MS)
        if not sizes.shape[1]:
            return np.asarray(base)
        log_ratio = _covariance(_octaves(sizes, self.block), self.octaves) @ self.process_weights
        ms: np.ndarray = base * np.exp(log_ratio)
        return ms


def _base_terms(sizes: np.ndarray, block: int) -> np.ndarray:
    """Compute the terms of the base, shape (samples, terms): 1, each size, their product."""
    padded = round_up(sizes, block).astype(float)
    columns = [np.ones(len(sizes)), *padded.T]
    if padded.shape[1] == 2:
        columns.append(padded.prod(1))
    return np.stack(columns, 1)


def non_negative_least_squares(terms: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Find the weights of zero or more with the least squared error, by trying every subset of at most four terms."""
    best, least = np.zeros(terms.shape[1]), np.inf
    for chosen in product((False, True), repeat=terms.shape[1]):
        mask = np.array(chosen)
        weights = np.linalg.lstsq(terms[:, mask], wanted, rcond=None)[0] if mask.any() else np.zeros(0)
        error = float(((terms[:, mask] @ weights - wanted) ** 2).sum())
        if error < least and (weights >= 0).all():
            best, least = np.zeros(terms.shape[1]), error
            best[mask] = weights
    return best


def _octaves(sizes: np.ndarray, block: int) -> np.ndarray:
    """Convert sizes to log2, with an offset below one block, where other kernels run."""
    octaves: np.ndarray = np.log2(np.maximum(sizes, 1).astype(float)) - _SMALL_KERNEL_OFFSET * (sizes < block)
    return octaves


def _covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared exponential covariance, shape (a, b)."""
    squared_distance = ((a[:, None] - b[None]) ** 2).sum(-1)
    covariance: np.ndarray = _SIGNAL_DEVIATION**2 * np.exp(-0.5 * squared_distance / _LENGTH_SCALE**2)
    return covariance


def _median_per_size(sizes: np.ndarray, ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge measurements at the same sizes to their median."""
    if not sizes.shape[1]:
        return sizes[:1], np.array([np.median(ms)])
    distinct, row = np.unique(sizes, axis=0, return_inverse=True)
    return distinct, np.array([np.median(ms[row.ravel() == number]) for number in range(len(distinct))])
