"""``nnqmd spectrum ir``: infrared absorption."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from nnqmd_server.cli.spectrum import options, sources, words
from nnqmd_server.cli.spectrum import options as o

if TYPE_CHECKING:
    from nnqmd_server.spectra.currents import Current
    from nnqmd_server.spectra.dielectric import DielectricConstant
    from nnqmd_server.spectra.dipole_files import Dipoles
    from nnqmd_server.spectra.infrared import InfraredSpectrum

EXAMPLES = """
Examples:

  nnqmd spectrum ir runs/ammonia

  nnqmd spectrum ir runs/nh3-1 runs/nh3-2 --skip 2000 --lag 1500 --highest 3800 --out results

  nnqmd spectrum ir runs/ammonia --experiment measured.csv --experiment-unit cm^-1

  nnqmd spectrum ir dipoles.h5 --temperature 300
      what `nnqmd dipole` made of any trajectory

  nnqmd spectrum ir runs/water --charges O=-0.82,H=0.41
      fixed charges times velocities, for a run without dipoles
"""


class Quantum(StrEnum):
    """From the classical or Kubo-transformed function to the quantum one."""

    harmonic = "harmonic"
    standard = "standard"
    schofield = "schofield"
    egelstaff = "egelstaff"
    none = "none"


QuantumOption = Annotated[
    Quantum,
    typer.Option(
        help="quantum correction; harmonic is exact for path-integral dynamics, the others are for "
        "comparison with classical runs",
        rich_help_panel=o.PHYSICS,
    ),
]


def ir(
    runs: o.Runs,
    temperature: o.Temperature = None,
    skip: o.Skip = 0.0,
    extras: Annotated[
        str,
        typer.Option(
            help="file name, in the i-PI input, of extras with dipoles, to read instead of dipoles.h5",
            rich_help_panel=o.READING,
        ),
    ] = "",
    unit: Annotated[
        str, typer.Option(help="unit of these extras: eang, debye, atomic_unit", rich_help_panel=o.READING)
    ] = "",
    charges: Annotated[
        str,
        typer.Option(
            help="fixed charges in e times velocities instead of dipoles: O=-0.82,H=0.41",
            rich_help_panel=o.READING,
        ),
    ] = "",
    drop_cut: o.DropCut = False,
    lag: o.Lag = None,
    window: o.WindowName = o.Window.hann,
    quantum: QuantumOption = Quantum.harmonic,
    highest: o.Highest = 4000.0,
    out: o.Out = None,
    formats: o.Formats = o.EVERY_FORMAT,
    pictures: o.Pictures = True,
    experiment: o.Measured = None,
    experiment_unit: o.MeasuredUnit = "",
    fit_range: o.FitRange = (30.0, 4000.0),
) -> None:
    """Infrared absorption n(w)alpha(w) in cm^-1, from the bead-averaged dipoles of the cell."""
    from nnqmd_server.spectra.correlation import default_lag
    from nnqmd_server.spectra.infrared import infrared_spectrum
    from nnqmd_server.spectra.output.contents_ir import ir_result
    from nnqmd_server.spectra.output.experiment import read_experiment, with_experiment
    from nnqmd_server.spectra.output.save import save

    options.check(temperature, lag, skip, highest)
    options.check_unit(experiment_unit)
    fixed = options.charges(charges)
    measured = None if experiment is None else read_experiment(experiment, experiment_unit)
    opened, kelvin = sources.open_runs(runs, sources.Reading(temperature, drop_cut=drop_cut))
    folder = sources.output_folder(opened, out)
    dielectric = None
    with words.progress("dipoles") as tell:
        if fixed:
            found: Sequence[Dipoles | Current] = [sources.current(r, fixed, skip, tell) for r in opened]
        else:
            dipoles = [sources.dipoles(r, extras, unit, tell).after(skip) for r in opened]
            dielectric = _dielectric(dipoles, kelvin)
            found = dipoles
    shortest = min(f.duration for f in found)
    spectrum = infrared_spectrum(
        found, kelvin, lag or default_lag(shortest), highest, window.value, quantum.value
    )
    result = ir_result(spectrum, _warnings(spectrum), dielectric, sources.name_of(opened))
    result = sources.with_runs(result, opened, skip)
    if measured is not None:
        result = with_experiment(result, measured, *fit_range)
    with words.progress("writing") as tell:
        written = save(result, folder, [f.value for f in formats], pictures, progress=tell)
    words.show(result, written)


def _dielectric(dipoles: Sequence[Dipoles], kelvin: float) -> DielectricConstant:
    from nnqmd_server.spectra.dielectric import dielectric_constant

    return dielectric_constant(dipoles, kelvin)


def _warnings(spectrum: InfraredSpectrum) -> list[str]:
    warnings = length_warnings(spectrum.resolution, spectrum.n_blocks)
    if spectrum.n_jumps:
        warnings.append(f"{spectrum.n_jumps} jumps of the dipole by e times cell vectors were removed")
    return warnings


def length_warnings(resolution: float, n_blocks: int) -> list[str]:
    """What is doubtful about a short run; the resolution in cm^-1."""
    warnings = []
    if resolution > 10:
        warnings.append(
            f"the run is short: its lines are {resolution:.0f} cm^-1 wide (FWHM), and nothing below that "
            "wavenumber is known from it"
        )
    if n_blocks < 5:
        warnings.append(
            "fewer than 5 blocks: standard errors are " + ("missing" if n_blocks < 2 else "rough")
        )
    return warnings
