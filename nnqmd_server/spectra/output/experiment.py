"""A measured spectrum beside the computed one, on a fitted scale."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.output.labelled import Labelled, Quantity, Result
from nnqmd_server.units import MEV_PER_INVCM

Array = np.ndarray

_UNITS = {
    "meV": re.compile(r"\bmev\b", re.IGNORECASE),
    "cm^-1": re.compile(r"\bcm\s*\^?\s*[{(]?-1|\b1/cm\b|\bwavenumber", re.IGNORECASE),
}


@dataclass(frozen=True)
class Experiment:
    """A measured spectrum.

    Parameters
    ----------
    energy : Array
        [cm^-1], ascending, shape (n,).
    intensity : Array
        In the file's own unit, shape (n,).
    error : Array or None
        Standard deviation of each point, same unit.
    path : Path
        Where it was read.
    """

    energy: Array
    intensity: Array
    error: Array | None
    path: Path


def read_experiment(path: Path, unit: str = "") -> Experiment:
    """Two or three columns of text: energy, intensity, error; separated by spaces, commas or semicolons.

    Lines that do not begin with two numbers are a header or separate spectra. Points with an error of
    zero or less are left out, as detectors report them where nothing was counted.

    Parameters
    ----------
    path : Path
        The file.
    unit : str
        ``meV`` or ``cm^-1``. Empty: the header must name one of them.

    Raises
    ------
    DataError
        No file, too few points, or no unit.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}).", "Give a text file with two columns.") from error
    rows, header = [], []
    for line in text.splitlines():
        try:
            numbers = [float(word) for word in re.split(r"[\s,;]+", line.strip()) if word]
        except ValueError:
            header.append(line)
            continue
        if len(numbers) >= 2:
            rows.append(numbers[:3])
    if len(rows) < 10:
        raise DataError(
            f"{path} holds {len(rows)} rows of two numbers or more; a spectrum has at least 10.",
            "Give a text file with columns of energy, intensity and, if known, error.",
        )
    if len({len(row) for row in rows}) > 1:
        raise DataError(
            f"Some rows of {path} have two numbers, others three.", "Give every row an error, or none."
        )
    table = np.array(rows)
    keep = np.isfinite(table).all(axis=1)
    if table.shape[1] == 3:
        keep &= table[:, 2] > 0
    table = table[keep]
    table = table[np.argsort(table[:, 0], kind="stable")]
    if len(table) < 10:
        raise DataError(f"{path} has fewer than 10 points with a positive error.", "Give more points.")
    scale = 1 / MEV_PER_INVCM if _unit_of(path, unit, header) == "meV" else 1.0
    return Experiment(table[:, 0] * scale, table[:, 1], table[:, 2] if table.shape[1] == 3 else None, path)


def _unit_of(path: Path, unit: str, header: list[str]) -> str:
    if unit:
        return unit
    named = [name for name, pattern in _UNITS.items() if any(pattern.search(line) for line in header)]
    if len(named) != 1:
        raise DataError(
            f"The header of {path} does not say whether its energies are in meV or cm^-1.",
            "Add --experiment-unit meV or --experiment-unit cm^-1.",
        )
    return named[0]


def fitted_scale(experiment: Experiment, energy: Array, values: Array, low: float, high: float) -> float:
    """Factor that brings a measured spectrum onto a computed one.

    The weighted least-squares fit of ``measured = a * computed`` over the range, weights 1/error^2 (or
    equal ones), gives a; returned is 1/a.

    Parameters
    ----------
    experiment : Experiment
        The measurement.
    energy, values : Array
        The computed spectrum [cm^-1, any unit], shape (n,).
    low, high : float
        Range of the fit [cm^-1].
    """
    low, high = max(low, energy[0]), min(high, energy[-1])
    mine = (experiment.energy >= low) & (experiment.energy <= high)
    if mine.sum() < 5:
        raise DataError(
            f"{experiment.path} has {mine.sum()} points between {low:.0f} and {high:.0f} cm^-1.",
            "Check --experiment-unit and --fit-range.",
        )
    computed = np.interp(experiment.energy[mine], energy, values)
    weight = 1.0 if experiment.error is None else 1 / experiment.error[mine] ** 2
    a = np.sum(weight * computed * experiment.intensity[mine]) / np.sum(weight * computed**2)
    if not a > 0:
        raise DataError(
            f"No positive factor brings {experiment.path} onto the computed spectrum.",
            "Check its columns, its unit and --fit-range.",
        )
    return float(1 / a)


def with_experiment(
    result: Result, experiment: Experiment, low: float = 30.0, high: float = 4000.0
) -> Result:
    """The result with the measurement as a further array, on the scale of its main curve.

    Parameters
    ----------
    result : Result
        Computed spectrum along an axis in 1/cm.
    experiment : Experiment
        The measurement.
    low, high : float
        Range over which the scale is fitted [cm^-1].
    """
    spectrum = result.data[0]
    main = spectrum.curves[0]
    factor = fitted_scale(experiment, spectrum.axes[0].values, main.values, low, high)
    measured = Labelled(
        "experiment",
        f"{experiment.path.name}, times {factor:.4g}",
        (Quantity("energy_measured", experiment.energy, "1/cm", "energy of the measurement"),),
        (
            Quantity(
                "measured",
                factor * experiment.intensity,
                main.unit,
                f"{experiment.path.name} times {factor:.6g}",
                None if experiment.error is None else factor * experiment.error,
            ),
        ),
    )
    settings = dict(result.settings) | {
        "experiment": f"{experiment.path.name}, times {factor:.6g} (least squares against {main.name}, "
        f"{low:g} to {min(high, float(spectrum.axes[0].values[-1])):g} cm^-1)"
    }
    kept = tuple(d for d in result.data if d.name != "experiment")
    return replace(result, data=(*kept, measured), settings=settings)
