"""``nnqmd spectrum raman``: Raman spectra."""

from __future__ import annotations

from typing import Annotated

import typer

from nnqmd_server.cli.spectrum import ir, options, sources, words
from nnqmd_server.cli.spectrum import options as o

EXAMPLES = """
Examples:

  nnqmd spectrum raman runs/ammonia --extras alpha --unit angstrom3
      for <trajectory filename='alpha' extra_type='polarizability'> extras </trajectory> in the i-PI input

  nnqmd spectrum raman runs/1 runs/2 --extras alpha --unit atomic_unit --laser 532 --out results
"""


def raman(
    runs: o.Runs,
    extras: Annotated[
        str,
        typer.Option(
            help="file name, in the i-PI input, of the extras that hold polarizabilities",
            rich_help_panel=o.READING,
        ),
    ],
    unit: Annotated[
        str,
        typer.Option(
            help="their unit, which such files do not say: angstrom3 or atomic_unit",
            rich_help_panel=o.READING,
        ),
    ],
    temperature: o.Temperature = None,
    skip: o.Skip = 0.0,
    laser: Annotated[
        float | None,
        typer.Option(
            help="wavelength of the laser in nm, for the factor (1 - nu/nu_L)^4", rich_help_panel=o.PHYSICS
        ),
    ] = None,
    drop_cut: o.DropCut = False,
    lag: o.Lag = None,
    window: o.WindowName = o.Window.hann,
    quantum: ir.QuantumOption = ir.Quantum.harmonic,
    highest: o.Highest = 4000.0,
    out: o.Out = None,
    formats: o.Formats = o.EVERY_FORMAT,
    pictures: o.Pictures = True,
    experiment: o.Measured = None,
    experiment_unit: o.MeasuredUnit = "",
    fit_range: o.FitRange = (30.0, 4000.0),
) -> None:
    """Raman spectrum, VV and VH, from the bead-averaged polarizability of the cell."""
    from nnqmd_server.spectra.correlation import default_lag
    from nnqmd_server.spectra.output.contents_raman import raman_result
    from nnqmd_server.spectra.output.experiment import read_experiment, with_experiment
    from nnqmd_server.spectra.output.save import save
    from nnqmd_server.spectra.raman import raman_spectrum

    options.check(temperature, lag, skip, highest)
    options.check_unit(experiment_unit)
    nu = options.laser(laser)
    measured = None if experiment is None else read_experiment(experiment, experiment_unit)
    opened, kelvin = sources.open_runs(runs, sources.Reading(temperature, drop_cut=drop_cut))
    folder = sources.output_folder(opened, out)
    with words.progress("polarizabilities") as tell:
        found = [sources.polarizabilities(run, extras, unit, tell).after(skip) for run in opened]
    shortest = min(f.duration for f in found)
    spectrum = raman_spectrum(
        found, kelvin, lag or default_lag(shortest), highest, nu, window.value, quantum.value
    )
    notes = ir.length_warnings(spectrum.resolution, spectrum.n_blocks)
    result = raman_result(spectrum, notes, sources.name_of(opened))
    result = sources.with_runs(result, opened, skip)
    if measured is not None:
        result = with_experiment(result, measured, *fit_range)
    with words.progress("writing") as tell:
        written = save(result, folder, [f.value for f in formats], pictures, progress=tell)
    words.show(result, written)
