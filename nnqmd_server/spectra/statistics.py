"""Means with their standard errors, from blocks of one or many runs.

A block is long compared with what it measures, so blocks count as independent samples. An error here is
always the standard error of the mean, never the scatter of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nnqmd_server.errors import DataError

Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value and how well it is known.

    Parameters
    ----------
    value : Array
        The estimate from all data.
    variance : Array or None
        Square of its standard error, same shape; None for a single block.
    n_samples : int
        Blocks behind it. The error itself is known to a fraction 1/sqrt(2 (n - 1)).
    """

    value: Array
    variance: Array | None
    n_samples: int

    @property
    def error(self) -> Array | None:
        """Standard error of the mean, same shape as the value; None for a single block."""
        return None if self.variance is None else np.sqrt(self.variance)


@dataclass(frozen=True)
class Blocks:
    """Sums over blocks, and how many terms are in them: a mean is a sum of sums over a sum of counts.

    Parameters
    ----------
    sums : Array
        Shape (n_blocks, ..., n).
    counts : Array
        Number of terms of each entry of the last axis, shape (n_blocks, n).
    """

    sums: Array
    counts: Array

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def mean(self) -> Array:
        """Mean of all blocks together, shape (..., n)."""
        return self.sums.sum(axis=0) / np.maximum(self.counts.sum(axis=0), 1)

    def without(self, k: int) -> Array:
        """Mean of all blocks but one, shape (..., n)."""
        others = np.arange(len(self)) != k
        return self.sums[others].sum(axis=0) / np.maximum(self.counts[others].sum(axis=0), 1)

    def joined(self, other: Blocks) -> Blocks:
        """These blocks and those of another run of the same ensemble."""
        return Blocks(np.concatenate([self.sums, other.sums]), np.concatenate([self.counts, other.counts]))


def mean(samples: Array, weights: Array | None = None) -> Estimate:
    """Weighted mean of samples over the first axis, and its standard error.

    Parameters
    ----------
    samples : Array
        Shape (n, ...).
    weights : Array, optional
        Shape (n,), such as the lengths of the blocks; all equal by default.
    """
    samples = np.asarray(samples, dtype=float)
    weights = np.ones(len(samples)) if weights is None else np.asarray(weights, dtype=float)

    def of(k: int | None) -> Array:
        kept = np.arange(len(samples)) != (-1 if k is None else k)
        return np.average(samples[kept], axis=0, weights=weights[kept])

    return _jackknife(len(samples), weights, of)


def jackknife(blocks: Blocks, function: Callable[[Array], Array]) -> Estimate:
    """A function of the mean of all blocks, with the standard error by leaving out one block at a time.

    This is how an error passes through a route that is not linear, such as S(Q,E) from velocity
    correlation functions: ``function`` is the whole route. For a linear one it gives the standard error
    of the mean.

    Parameters
    ----------
    blocks : Blocks
        The samples.
    function : callable
        From a mean of shape (..., n) to an array; called once more than there are blocks.

    Returns
    -------
    Estimate
        ``function(blocks.mean)`` and its variance, by the jackknife for blocks of unequal size (Busing,
        Meijer and van der Leeden, Statistics and Computing 9, 3 (1999)).
    """

    def of(k: int | None) -> Array:
        return np.asarray(function(blocks.mean if k is None else blocks.without(k)))

    return _jackknife(len(blocks), blocks.counts[:, 0].astype(float), of)


def _jackknife(n: int, weights: Array, of: Callable[[int | None], Array]) -> Estimate:
    if n == 0 or not weights.sum() > 0:
        raise DataError(
            "There is no block to average over.", "Run longer, or shorten the correlation window."
        )
    value = of(None)
    if n < 2:
        return Estimate(value, None, n)
    h = (weights.sum() / weights).reshape(-1, *[1] * value.ndim)
    left = np.array([of(k) for k in range(n)])
    pseudo = h * value - (h - 1) * left
    centre = n * value - ((1 - 1 / h) * left).sum(axis=0)
    variance = ((pseudo - centre) ** 2 / (h - 1)).sum(axis=0) / n
    return Estimate(value, variance, n)
