"""The statistics of times to failure, on synthetic runs whose law is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from nnqmd_server.errors import DataError
from nnqmd_server.fidelity.report import analyse, failures_needed
from nnqmd_server.fidelity.study import Runs
from nnqmd_server.fidelity.survival import bootstrap, fit, kaplan_meier, summarise

SIZES = (16, 64, 128, 256, 432)


def limit_for(beta, shape, share):
    """The time at which so many of all runs still live."""
    q = (np.arange(20000) + 0.5) / 20000
    unit = (-np.log(q)) ** (1 / shape)
    times = np.concatenate([1000 * (size / 100) ** -beta * unit for size in SIZES])
    return float(np.quantile(times, 1 - share))


def synthetic(rng, beta, shape, seeds, share=0.3):
    """Times [fs], whether they are failures, sizes and limits of runs of which so many are censored."""
    atoms = np.repeat(SIZES, seeds)
    limit = limit_for(beta, shape, share)
    times = 1000 * (atoms / 100) ** -beta * rng.weibull(shape, len(atoms))
    return np.minimum(times, limit), times < limit, atoms, np.full(len(atoms), limit)


@pytest.mark.parametrize("beta", [0.29, 0.14])
@pytest.mark.parametrize(("distribution", "shape"), [("exponential", 1.0), ("weibull", 1.7)])
def test_a_known_exponent_is_recovered_with_three_runs_in_ten_censored(beta, distribution, shape):
    times, failed, atoms, limits = synthetic(np.random.default_rng(8), beta, shape, seeds=150)
    assert 0.25 < 1 - failed.mean() < 0.35
    found = fit(times, failed, atoms, distribution)
    (interval,) = bootstrap(found, times, failed, atoms, limits, [0.95], replicates=400)
    print(
        f"beta {beta}: {found.beta:.3f} +- {found.beta_error:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
    )
    assert interval.low < beta < interval.high
    assert interval.high - interval.low < 0.24
    assert found.shape == pytest.approx(shape, rel=0.1)
    # the two published exponents can be told apart with so many runs
    assert abs(found.beta - beta) < 0.075


def test_leaving_out_censored_runs_would_be_wrong():
    rng = np.random.default_rng(5)
    times, failed, atoms, _ = synthetic(rng, 0.29, 1.0, seeds=2000)
    kept = fit(times, failed, atoms)
    dropped = fit(times[failed], failed[failed], atoms[failed])
    taken_for_failures = fit(times, np.ones_like(failed), atoms)
    assert kept.beta == pytest.approx(0.29, abs=4 * kept.beta_error)
    assert dropped.beta < 0.29 - 4 * dropped.beta_error
    assert taken_for_failures.beta < 0.29 - 4 * taken_for_failures.beta_error


@pytest.mark.parametrize(("beta", "shape"), [(0.29, 1.0), pytest.param(0.14, 1.5, marks=pytest.mark.slow)])
def test_intervals_cover_the_truth_as_often_as_they_say(beta, shape):
    """68 and 95 % intervals over many synthetic studies of 8 seeds and 5 sizes."""
    rng = np.random.default_rng(31)
    sets, inside = 400, {0.68: 0, 0.95: 0}
    for number in range(sets):
        times, failed, atoms, limits = synthetic(rng, beta, shape, seeds=8)
        found = fit(times, failed, atoms)
        for interval in bootstrap(found, times, failed, atoms, limits, list(inside), 200, seed=number):
            inside[interval.level] += interval.low <= beta <= interval.high
    for level, count in inside.items():
        print(f"beta {beta}, shape {shape}: {count} of {sets} intervals of {100 * level:.0f} % cover")
        low, high = stats.binom.interval(0.9999, sets, level)
        assert low <= count <= high


def test_the_maximum_is_that_of_a_likelihood_written_out():
    times, failed, atoms, _ = synthetic(np.random.default_rng(2), 0.29, 1.3, seeds=6)
    found = fit(times, failed, atoms)

    def minus_log_likelihood(theta):
        a, beta, log_shape = theta
        law = stats.weibull_min(c=np.exp(log_shape), scale=np.exp(a) * atoms**-beta)
        return -np.where(failed, law.logpdf(times), law.logsf(times)).sum()

    best = optimize.minimize(
        minus_log_likelihood, [8.0, 0.2, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-10}
    )
    assert found.log_likelihood == pytest.approx(-best.fun, abs=1e-5)
    assert found.beta == pytest.approx(best.x[1], abs=1e-4)
    assert found.shape == pytest.approx(np.exp(best.x[2]), rel=1e-4)
    assert found.scale_at(128) == pytest.approx(np.exp(best.x[0]) * 128 ** -best.x[1], rel=1e-4)
    # the curvature, by finite differences along beta with the others at their best
    values = []
    for beta in found.beta + np.array([-0.02, 0.0, 0.02]):
        inner = optimize.minimize(
            lambda rest, beta=beta: minus_log_likelihood([rest[0], beta, rest[1]]),
            [best.x[0], best.x[2]],
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-10},
        )
        values.append(inner.fun)
    curvature = (values[0] - 2 * values[1] + values[2]) / 0.02**2
    assert found.beta_error == pytest.approx(curvature**-0.5, rel=0.01)


def test_survival_and_means_agree_with_scipy():
    times, failed, atoms, _ = synthetic(np.random.default_rng(3), 0.29, 1.0, seeds=12)
    here = atoms == 128
    censored = stats.CensoredData.right_censored(times[here], ~failed[here])
    at, alive = kaplan_meier(times[here], failed[here])
    theirs = stats.ecdf(censored).sf
    assert np.interp(at[1:], theirs.quantiles, theirs.probabilities) == pytest.approx(alive[1:])
    size = next(one for one in summarise(times, failed, atoms) if one.atoms == 128)
    _, scale = stats.expon.fit(censored, floc=0)
    assert size.mean == pytest.approx(scale, rel=1e-4)
    assert size.low < size.mean < size.high


def test_runs_that_tell_no_slope_are_refused_in_words():
    atoms = np.array([16, 16, 16, 64, 64, 64])
    times = np.array([100.0, 120, 90, 200, 200, 200])
    with pytest.raises(DataError, match=r"3 of 6 runs failed, at 1 of the sizes"):
        fit(times, times < 150, atoms)
    with pytest.raises(DataError, match="not above zero"):
        fit(times * 0, times < 150, atoms)
    runs = Runs("m", 1, times, np.zeros(6, bool), atoms, np.full(6, 200.0))
    found = analyse(runs, [])
    assert found.fit is None
    assert "0 of 6 runs failed" in found.why
    assert all(np.isinf(size.mean) and size.low > 0 for size in found.sizes)


def test_how_many_failures_a_measurement_needs():
    """Four times the runs halve the error; the estimate made from few runs says so."""
    rng = np.random.default_rng(12)
    few = fit(*synthetic(rng, 0.29, 1.0, seeds=40)[:3])
    many = fit(*synthetic(rng, 0.29, 1.0, seeds=160)[:3])
    assert failures_needed(few, many.beta_error) == pytest.approx(many.failures, rel=0.2)
