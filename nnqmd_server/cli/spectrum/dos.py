"""``nnqmd spectrum dos``: vibrational densities of states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from nnqmd_server.cli.spectrum import motion, options, sources, words
from nnqmd_server.cli.spectrum import options as o
from nnqmd_server.errors import InputError

if TYPE_CHECKING:
    from nnqmd_server.spectra.deconvolution import Deconvolution
    from nnqmd_server.spectra.vibrations import Vibrations

EXAMPLES = """
Examples:

  nnqmd spectrum dos runs/ammonia --skip 2000

  nnqmd spectrum dos runs/water --group 'surface=0-32' --isotope surface=D --out surface

  nnqmd spectrum dos runs/gle --deconvolve

  nnqmd spectrum dos md.lammpstrj --temperature 300 --timestep 0.5 --unit metal --elements O,H
"""


Deconvolve = Annotated[
    bool,
    typer.Option(
        "--deconvolve",
        help="take out the mark of the centroid's thermostat (gle, nm_gle, langevin, pile_l)",
        rich_help_panel=o.PHYSICS,
    ),
]


def dos(
    runs: o.Runs,
    temperature: o.Temperature = None,
    skip: o.Skip = 0.0,
    timestep: o.Timestep = None,
    interval: o.Interval = None,
    unit: o.Unit = "",
    elements: o.Elements = "",
    drop_cut: o.DropCut = False,
    lag: o.Lag = None,
    window: o.WindowName = o.Window.hann,
    highest: o.Highest = 4000.0,
    group: o.Groups = [],  # noqa: B006 - typer copies it
    isotope: o.Isotopes = [],  # noqa: B006
    deconvolve: Deconvolve = False,
    out: o.Out = None,
    formats: o.Formats = o.EVERY_FORMAT,
    pictures: o.Pictures = True,
) -> None:
    """Vibrational density of states by element, and the generalised one that neutrons see."""
    from nnqmd_server.spectra.output.contents_dos import dos_result
    from nnqmd_server.spectra.output.save import save

    options.check(temperature, lag, skip, highest)
    overrides = options.isotopes(isotope)
    reading = sources.Reading(temperature, timestep, interval, unit, elements, drop_cut)
    opened, kelvin = sources.open_runs(runs, reading)
    folder = sources.output_folder(opened, out)
    found = motion.moved(opened, kelvin, skip, lag, window, group)
    notes = [*found.notes, *motion.reach_warnings(found.vibrations, highest)]
    vibrations = found.vibrations
    sharpened = _without_thermostat(opened, vibrations, highest) if deconvolve else None
    result = dos_result(vibrations, overrides, highest, notes, sources.name_of(opened), sharpened)
    result = sources.with_runs(result, opened, skip)
    with words.progress("writing") as tell:
        written = save(result, folder, [f.value for f in formats], pictures, progress=tell)
    words.show(result, written)


def _without_thermostat(
    runs: Sequence[sources.Run], vibrations: Vibrations, highest: float
) -> tuple[Deconvolution, ...]:
    """Every element's density without the centroid's thermostat."""
    from nnqmd_server.spectra.deconvolution import thermostat_of, without_thermostat

    if runs[0].plan is None:
        raise InputError("--deconvolve needs the i-PI input.", "Give the folder that `nnqmd run` made.")
    drift, covariance = thermostat_of(runs[0].path / "input.xml")
    with words.progress("deconvolution") as tell:
        return without_thermostat(vibrations, drift, covariance, highest, progress=tell)
