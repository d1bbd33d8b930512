"""What a study found, as numbers: fits, intervals, a table of sizes, and one file with all of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnqmd_server.errors import DataError, OutputError
from nnqmd_server.fidelity.sharpness import Sharpness
from nnqmd_server.fidelity.study import Record, Runs
from nnqmd_server.fidelity.survival import (
    Distribution,
    Fit,
    Interval,
    SizeSummary,
    bootstrap,
    fit,
    summarise,
)

LEVELS = (0.68, 0.95)
"""Confidence levels of the intervals for beta."""


@dataclass(frozen=True)
class Series:
    """What was found for one model and number of beads; ``why`` tells why there is no fit."""

    runs: Runs
    sizes: list[SizeSummary]
    fit: Fit | None
    intervals: tuple[Interval, ...]
    other: Fit | None
    why: str
    criteria: dict[str, int]


def analyse(
    runs: Runs,
    records: Sequence[Record],
    distribution: Distribution = "weibull",
    replicates: int = 2000,
    tell: Callable[[float], None] | None = None,
) -> Series:
    """Fit one model's times to failure; a model that failed too rarely gets no fit, but a reason.

    ``other`` is the fit with the other distribution, for comparison.
    """
    sizes = summarise(runs.times, runs.failed, runs.atoms)
    own = [r for r in records if (r.model, r.beads) == (runs.model, runs.beads) and r.failed]
    criteria = dict(Counter(r.criterion for r in own).most_common())
    data = (runs.times, runs.failed, runs.atoms)
    try:
        found = fit(*data, distribution)
        other = fit(*data, "exponential" if distribution == "weibull" else "weibull")
        intervals = bootstrap(found, *data, runs.limits, LEVELS, replicates, tell=tell)
    except DataError as error:
        return Series(runs, sizes, None, (), None, f"{error.what} {error.fix}", criteria)
    return Series(runs, sizes, found, intervals, other, "", criteria)


def failures_needed(fit: Fit, error: float = 0.05) -> int:
    """About how many failures give beta a certain standard error, at the same sizes.

    The standard error falls with the square root of the number of failures; this scales the one found.
    """
    return int(np.ceil(fit.failures * (fit.beta_error / error) ** 2))


def figures(series: Sequence[Series], sharpness: Sequence[Sharpness]) -> dict[str, Any]:
    """Everything as plain JSON types, with units in the names."""
    return {
        "series": [_figures_of(one) for one in series],
        "sharpness": [
            {
                "model": s.model,
                "relative_noise": s.epsilon,
                "draws": s.draws,
                "frames": s.frames,
                "loss_eV2": s.loss,
                "loss_rise_eV2": s.rise,
                "loss_rise_standard_error_eV2": s.rise_error,
                "force_rmse_eV_per_A": s.force_rmse,
                "force_rmse_shaken_eV_per_A": s.force_rmse_shaken,
            }
            for s in sharpness
        ],
    }


def _figures_of(one: Series) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": one.runs.model,
        "beads": one.runs.beads,
        "runs": len(one.runs.times),
        "failures": int(one.runs.failed.sum()),
        "failures_by_criterion": one.criteria,
        "sizes": [
            {
                "atoms": s.atoms,
                "runs": s.runs,
                "failures": s.failures,
                "mean_time_to_failure_fs": None if np.isinf(s.mean) else s.mean,
                "interval_68_fs": [s.low, None if np.isinf(s.high) else s.high],
            }
            for s in one.sizes
        ],
        "no_fit_because": one.why,
    }
    if one.fit:
        found["fit"] = asdict(one.fit) | {"aic": one.fit.aic, "time_unit": "fs"}
        found["beta_intervals"] = [asdict(interval) for interval in one.intervals]
    if one.other:
        found["other_fit"] = asdict(one.other) | {"aic": one.other.aic, "time_unit": "fs"}
    return found


def write_figures(path: Path, found: dict[str, Any]) -> None:
    """Write the figures of a study as JSON.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    try:
        path.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror}.", "Choose another --out.") from error
