"""Times to failure against the number of atoms: log t = a - beta log N + W / k, with runs that did not fail.

A run that reached its last step tells that its time to failure is longer; leaving such runs out, or taking
their length for a time to failure, would bias both t and beta. So the likelihood has the density of those
that failed and the survival function of those that did not (right-censored; Kalbfleisch and Prentice, The
Statistical Analysis of Failure Time Data, 2nd ed., chapter 3). W has the extreme-value density
exp(w - e^w), which makes t Weibull with shape k, S(t) = exp(-(t/tau)^k), or exponential where k = 1.

In p = k a, q = k beta and k the logarithm of the likelihood is concave, so Newton's method finds its one
maximum; it runs for many data sets at once, which the bootstrap needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.structures import Array

Distribution = Literal["weibull", "exponential"]

_ITERATIONS = 100
_FAR = 50.0
"""A slope beyond this is no maximum but a likelihood that grows for ever: all failures at one size."""

_BATCH = 1 << 22  # numbers held at once by a batch of fits


@dataclass(frozen=True)
class Fit:
    """A fitted law of times to failure, log t = log(reference) - beta log(N / pivot) + W / shape.

    Parameters
    ----------
    beta : float
        The exponent: t falls as N^-beta.
    beta_error : float
        Its standard error from the curvature of the likelihood.
    scale : float
        Weibull scale at ``pivot`` [unit of the times given], the time that exp(-1) of the runs survive.
    shape : float
        Weibull shape k; above 1, failures come more often the longer a run has lasted.
    shape_error : float
        Its standard error; 0 for the exponential distribution.
    pivot : float
        The number of atoms to which ``scale`` refers (geometric mean of the runs).
    log_likelihood : float
        At the maximum, with times in the unit given.
    distribution : str
        "weibull" or "exponential".
    runs, failures : int
        How many runs there are, and how many failed.
    """

    beta: float
    beta_error: float
    scale: float
    shape: float
    shape_error: float
    pivot: float
    log_likelihood: float
    distribution: Distribution
    runs: int
    failures: int

    @property
    def aic(self) -> float:
        """Akaike's criterion; of two distributions on the same runs the one with the lower is preferred."""
        return 2 * (3 if self.distribution == "weibull" else 2) - 2 * self.log_likelihood

    def scale_at(self, atoms: Array | float) -> Array:
        """Weibull scale [unit of the times given] for a number of atoms."""
        return self.scale * (np.asarray(atoms, dtype=float) / self.pivot) ** -self.beta

    def mean_at(self, atoms: Array | float) -> Array:
        """Mean time to failure [unit of the times given], tau Gamma(1 + 1/k)."""
        from scipy.special import gamma

        return self.scale_at(atoms) * float(gamma(1 + 1 / self.shape))

    def survival(self, times: Array, atoms: float) -> Array:
        """Share of runs of this size that is expected to live at these times."""
        return np.exp(-((np.asarray(times, dtype=float) / self.scale_at(atoms)) ** self.shape))


@dataclass(frozen=True)
class Interval:
    """An interval for beta at a confidence level, and the bootstrap sample behind it."""

    low: float
    high: float
    level: float
    replicates: int


def fit(times: Array, failed: Array, atoms: Array, distribution: Distribution = "weibull") -> Fit:
    """Maximum-likelihood fit of times to failure against the number of atoms.

    Parameters
    ----------
    times : Array
        How long each run lasted, in any unit, shape (n_runs,), above zero.
    failed : Array of bool
        Whether it failed then; False for a run that ended without failure (right-censored).
    atoms : Array
        Number of atoms of each run, shape (n_runs,).
    distribution : str
        "weibull", or "exponential" for a failure rate that does not depend on the time.

    Raises
    ------
    DataError
        Too little failed for a slope: less than three runs, or at one size only.
    """
    times, failed, atoms = _checked(times, failed, atoms)
    pivot = float(np.exp(np.log(atoms).mean()))
    unit = float(np.exp(np.log(times).mean()))  # numbers near one
    found = _maximise(
        np.log(times / unit)[None], failed[None], np.log(atoms / pivot), distribution == "weibull"
    )
    p, q, k = (float(found.theta[0, i]) for i in range(3))
    if not found.converged[0] or abs(q / k) > _FAR:
        raise DataError(
            "The likelihood of these failures has no maximum: they do not tell a slope.",
            "Run more seeds, or sizes at which some runs fail and some do not.",
        )
    deaths = int(failed.sum())
    # d(log t) = dt / t, and the unit of time was taken out.
    log_likelihood = float(found.value[0]) - float(np.log(times[failed]).sum())
    covariance = found.covariance[0]
    gradient = np.array([0.0, 1 / k, -q / k**2])
    return Fit(
        beta=q / k,
        beta_error=float(np.sqrt(gradient @ covariance @ gradient)),
        scale=unit * float(np.exp(p / k)),
        shape=k,
        shape_error=float(np.sqrt(covariance[2, 2])),
        pivot=pivot,
        log_likelihood=log_likelihood,
        distribution=distribution,
        runs=len(times),
        failures=deaths,
    )


def _checked(times: Array, failed: Array, atoms: Array) -> tuple[Array, Array, Array]:
    times, atoms = np.asarray(times, dtype=float), np.asarray(atoms, dtype=float)
    failed = np.asarray(failed, dtype=bool)
    if not (np.isfinite(times).all() and (times > 0).all() and (atoms > 0).all()):
        raise DataError("A time to failure is not above zero.", "Look at the results file.")
    sizes = len(set(atoms[failed].tolist()))
    if failed.sum() < 3 or sizes < 2:
        raise DataError(
            f"{int(failed.sum())} of {len(times)} runs failed, at {sizes} of the sizes: too few for a slope"
            " against N.",
            "Run longer (--steps), at a higher temperature, or more seeds.",
        )
    return times, failed, atoms


@dataclass(frozen=True)
class _Maxima:
    """Of each data set: (p, q, k), whether it is a maximum, its value, and the inverse of the curvature."""

    theta: Array
    converged: Array
    value: Array
    covariance: Array


def _maximise(y: Array, failed: Array, x: Array, free_shape: bool) -> _Maxima:
    """Newton's method for many data sets at once.

    Parameters
    ----------
    y : Array
        log t, shape (n_sets, n_runs).
    failed : Array of bool
        Shape (n_sets, n_runs).
    x : Array
        log N, shape (n_runs,) or (n_sets, n_runs).
    free_shape : bool
        Whether k is fitted or 1.
    """
    x = np.broadcast_to(x, y.shape)
    weight = failed.astype(float)
    deaths = weight.sum(axis=1)
    # z = k y - p + q x, linear in the parameters
    design = np.stack([-np.ones_like(y), x, y], axis=-1)
    count = 3 if free_shape else 2
    columns = design[..., :count]
    theta = np.zeros((len(y), 3))
    theta[:, 2] = 1.0
    # the exponential law without a slope: rate = failures / time
    theta[:, 0] = np.log(np.maximum(np.exp(y).sum(axis=1), 1e-300) / np.maximum(deaths, 0.5))
    value = _value(design, theta, weight, deaths)
    converged = np.zeros(len(y), dtype=bool)
    hessian = np.zeros((len(y), count, count))
    for _ in range(_ITERATIONS):
        risk = np.exp(np.clip((design @ theta[..., None])[..., 0], -700, 700))
        gradient = ((weight - risk)[:, None] @ columns)[:, 0]
        hessian = (columns * risk[..., None]).transpose(0, 2, 1) @ columns
        if free_shape:
            gradient[:, 2] += deaths / theta[:, 2]
            hessian[:, 2, 2] += deaths / theta[:, 2] ** 2
        hessian[:, range(count), range(count)] += 1e-12
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        converged = np.einsum("bi,bi->b", gradient, step) < 1e-12 * np.maximum(1.0, deaths)
        if converged.all():
            break
        theta, value = _walk(design, theta, step, value, weight, deaths, free_shape)
        if (np.abs(theta[:, 1]) > 10 * _FAR * theta[:, 2]).sum() + converged.sum() == len(y):
            break
    covariance = np.zeros((len(y), 3, 3))
    covariance[:, :count, :count] = np.linalg.inv(hessian)
    return _Maxima(theta, converged, value, covariance)


def _value(design: Array, theta: Array, weight: Array, deaths: Array) -> Array:
    z = (design @ theta[..., None])[..., 0]
    with np.errstate(over="ignore"):
        return (weight * z - np.exp(z)).sum(axis=1) + deaths * np.log(theta[:, 2])


def _walk(
    design: Array,
    theta: Array,
    step: Array,
    value: Array,
    weight: Array,
    deaths: Array,
    free_shape: bool,
) -> tuple[Array, Array]:
    """A Newton step, halved where it would leave k > 0 or lower the likelihood."""
    length = np.ones(len(theta))
    if free_shape:
        down = step[:, 2] < 0
        length[down] = np.minimum(1.0, -0.9 * theta[down, 2] / step[down, 2])
    new = theta.copy()
    for _ in range(40):
        new[:, : step.shape[1]] = theta[:, : step.shape[1]] + length[:, None] * step
        trial = _value(design, new, weight, deaths)
        worse = ~(trial >= value - 1e-10 * np.abs(value) - 1e-12)
        if not worse.any():
            return new, trial
        length[worse] *= 0.5
    new[worse] = theta[worse]
    return new, np.where(worse, value, trial)


def bootstrap(
    found: Fit,
    times: Array,
    failed: Array,
    atoms: Array,
    limits: Array,
    levels: Sequence[float] = (0.68, 0.95),
    replicates: int = 2000,
    seed: int = 0,
    tell: Callable[[float], None] | None = None,
) -> tuple[Interval, ...]:
    """Bootstrap-t intervals for beta: data drawn from the fitted law, censored as the runs were, refitted.

    Resampling the runs themselves needs many of every size. The law is drawn from instead, and
    (beta* - beta) is taken in units of its own standard error, whose distribution hardly depends on the
    true parameters (Davison and Hinkley, Bootstrap Methods and their Application, sections 2.4 and 7.3).
    docs/fidelity.md has the measured coverage.

    Parameters
    ----------
    found : Fit
        The fit of these data.
    times, failed, atoms : Array
        As for :func:`fit`.
    limits : Array
        How long each run would have lasted without failing [unit of the times], shape (n_runs,).
    levels : sequence of float
        Confidence levels.
    replicates : int
        Data sets that are drawn.
    seed : int
        Of the random numbers.
    tell : callable, optional
        Told which part is done.
    """
    times, failed, atoms = _checked(times, failed, atoms)
    limits = np.maximum(np.asarray(limits, dtype=float), times)
    rng = np.random.default_rng(seed)
    quotients = []
    chunk = max(1, _BATCH // (8 * len(times)))
    for first in range(0, replicates, chunk):
        size = min(chunk, replicates - first)
        drawn = found.scale_at(atoms) * rng.weibull(found.shape, size=(size, len(times)))
        quotients.append(_quotients(found, np.minimum(drawn, limits), drawn < limits, atoms))
        if tell:
            tell((first + size) / replicates)
    t = np.concatenate(quotients)
    if len(t) < replicates / 2:
        raise DataError(
            "Most data sets drawn from the fitted law tell no slope, so there is no interval for it.",
            "Run more seeds, or longer.",
        )
    found_intervals = []
    for level in levels:
        # the quantile definition that makes few replicates no narrower than many
        low, high = np.quantile(t, [0.5 - level / 2, 0.5 + level / 2], method="weibull")
        ends = found.beta - float(high) * found.beta_error, found.beta - float(low) * found.beta_error
        found_intervals.append(Interval(*ends, level, len(t)))
    return tuple(found_intervals)


def _quotients(found: Fit, times: Array, failed: Array, atoms: Array) -> Array:
    """(beta* - beta) / error* of drawn data sets; those that tell no slope are left out."""
    x = np.log(atoms / found.pivot)
    enough = (failed.sum(axis=1) >= 3) & _at_two_sizes(failed, atoms)
    times, failed = times[enough], failed[enough]
    if not len(times):
        return np.empty(0)
    maxima = _maximise(np.log(times / found.scale), failed, x, found.distribution == "weibull")
    p_q_k, covariance = maxima.theta, maxima.covariance
    beta = p_q_k[:, 1] / p_q_k[:, 2]
    gradient = np.stack([np.zeros_like(beta), 1 / p_q_k[:, 2], -beta / p_q_k[:, 2]], axis=1)
    error = np.sqrt(np.einsum("bi,bij,bj->b", gradient, covariance, gradient))
    good = maxima.converged & (np.abs(beta) < _FAR) & np.isfinite(error) & (error > 0)
    return ((beta - found.beta) / np.where(good, error, 1.0))[good]


def _at_two_sizes(failed: Array, atoms: Array) -> Array:
    sizes = np.unique(atoms)
    return sum(failed[:, atoms == size].any(axis=1).astype(int) for size in sizes) >= 2


@dataclass(frozen=True)
class SizeSummary:
    """Runs of one size: mean time to failure with its interval, from time lived per failure.

    ``mean`` is the total time of all runs divided by the failures (maximum likelihood for a constant rate),
    infinite without failures; ``low`` and ``high`` bound it (chi-squared, exact for a constant rate and
    runs that were stopped at failures, close to it otherwise).
    """

    atoms: int
    runs: int
    failures: int
    mean: float
    low: float
    high: float


def summarise(times: Array, failed: Array, atoms: Array, level: float = 0.68) -> list[SizeSummary]:
    """Mean times to failure, size by size; parameters as for :func:`fit`."""
    from scipy.stats import chi2

    times, failed, atoms = np.asarray(times, float), np.asarray(failed, bool), np.asarray(atoms)
    rows = []
    for size in sorted(set(atoms.tolist())):
        here = atoms == size
        total, deaths = float(times[here].sum()), int(failed[here].sum())
        tail = (1 - level) / 2
        high = 2 * total / float(chi2.ppf(tail, 2 * deaths)) if deaths else np.inf
        low = 2 * total / float(chi2.ppf(1 - tail, 2 * deaths + 2))
        mean = total / deaths if deaths else np.inf
        rows.append(SizeSummary(int(size), int(here.sum()), deaths, mean, low, float(high)))
    return rows


def kaplan_meier(times: Array, failed: Array) -> tuple[Array, Array]:
    """Kaplan and Meier's estimate of the survival function.

    Parameters
    ----------
    times : Array
        Shape (n_runs,).
    failed : Array of bool
        Shape (n_runs,).

    Returns
    -------
    tuple of Array
        Times of failures, and the share of runs that live just after each, both with the start (0, 1).
    """
    times, failed = np.asarray(times, float), np.asarray(failed, bool)
    at, alive = [0.0], [1.0]
    for time in np.unique(times[failed]):
        at_risk = int((times >= time).sum())
        deaths = int((failed & (times == time)).sum())
        at.append(float(time))
        alive.append(alive[-1] * (1 - deaths / at_risk))
    return np.array(at), np.array(alive)
