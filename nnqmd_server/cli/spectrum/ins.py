"""``nnqmd spectrum ins``: inelastic neutron scattering."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnqmd_server.cli.spectrum import instrument as i
from nnqmd_server.cli.spectrum import motion, options, sources, words
from nnqmd_server.cli.spectrum import options as o
from nnqmd_server.errors import InputError

if TYPE_CHECKING:
    from nnqmd_server.spectra.debye_waller import DebyeWallerCheck
    from nnqmd_server.spectra.inelastic import NeutronSpectrum
    from nnqmd_server.spectra.instruments import Instrument
    from nnqmd_server.spectra.liquid import LiquidCorrection

EXAMPLES = """
Examples:

  nnqmd spectrum ins runs/ammonia

  nnqmd spectrum ins runs/ammonia --skip 2000 --out results --experiment measured.dat

  nnqmd spectrum ins runs/nh3-1 runs/nh3-2 runs/nh3-3 --skip 2000 --out results
      three independent runs of one system: one spectrum, with smaller errors

  nnqmd spectrum ins runs/ammonia --instrument sequoia --ei 600 --chopper 600 --out sequoia

  nnqmd spectrum ins runs/ammonia --isotope H=D --out deuterated

  nnqmd spectrum ins runs/liquid --state liquid --lag 3000

  nnqmd spectrum ins --modes mesh.yaml --temperature 5 --out harmonic
"""

RunsOrNone = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[RUN]...",
        help="folders that `nnqmd run` made, or trajectory files; several are independent runs of one system",
    ),
]
StateOption = Annotated[
    o.State,
    typer.Option(
        help="solid: sharp elastic line; liquid: quasi-elastic line; auto: look", rich_help_panel=o.PHYSICS
    ),
]
Isotropic = Annotated[
    bool,
    typer.Option(
        "--isotropic",
        help="average directions before, not after, the Debye-Waller factor",
        rich_help_panel=o.PHYSICS,
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact/--no-exact",
        help="correct a liquid with the exact classical F(Q,t), when the run wrote positions as often as "
        "velocities",
        rich_help_panel=o.PHYSICS,
    ),
]
Modes = Annotated[
    Path | None,
    typer.Option(
        help="phonon modes instead of runs: phonopy's yaml or hdf5, Euphonic's JSON",
        rich_help_panel=o.READING,
    ),
]


Device = Annotated[
    str,
    typer.Option(
        help="where the exact F(Q,t) is computed: cpu, auto (a GPU if there is one), cuda",
        rich_help_panel=o.PHYSICS,
    ),
]
ModesCell = Annotated[
    Path | None,
    typer.Option(
        "--modes-cell",
        help="phonopy yaml that names the atoms, beside a mesh.hdf5",
        rich_help_panel=o.READING,
    ),
]


def ins(
    runs: RunsOrNone = None,
    modes: Modes = None,
    modes_cell: ModesCell = None,
    temperature: o.Temperature = None,
    skip: o.Skip = 0.0,
    timestep: o.Timestep = None,
    interval: o.Interval = None,
    unit: o.Unit = "",
    elements: o.Elements = "",
    drop_cut: o.DropCut = False,
    instrument: i.NameOption = i.Name.vision,
    ei: i.Ei = None,
    angles: i.Angles = None,
    resolution: i.Resolution = "",
    chopper: i.Chopper = None,
    chopper_package: i.ChopperPackage = "",
    lag: o.Lag = None,
    window: o.WindowName = o.Window.hann,
    highest: o.Highest = 4000.0,
    state: StateOption = o.State.auto,
    isotropic: Isotropic = False,
    exact: Exact = True,
    device: Device = "cpu",
    group: o.Groups = [],  # noqa: B006 - typer copies it
    isotope: o.Isotopes = [],  # noqa: B006
    out: o.Out = None,
    formats: o.Formats = o.EVERY_FORMAT,
    pictures: o.Pictures = True,
    experiment: o.Measured = None,
    experiment_unit: o.MeasuredUnit = "",
    fit_range: o.FitRange = (30.0, 4000.0),
) -> None:
    """S(Q,E) as a neutron spectrometer shows it, all orders, from the velocities of the centroid.

    Quantum statistics, the Debye-Waller factor, recoil and all multiphonon orders come from the velocity
    autocorrelation of centroid (or classical) dynamics; docs/spectra.md has the formulas.
    """
    from nnqmd_server.spectra.inelastic import neutron_spectrum
    from nnqmd_server.spectra.output.contents_ins import ins_result
    from nnqmd_server.spectra.output.experiment import read_experiment, with_experiment
    from nnqmd_server.spectra.output.save import save
    from nnqmd_server.spectra.qe_map import map_of
    from nnqmd_server.spectra.uncertainty import standard_errors

    options.check(temperature, lag, skip, highest)
    options.check_unit(experiment_unit)
    machine = i.chosen(instrument, ei, angles, resolution, chopper, chopper_package)
    overrides = options.isotopes(isotope)
    measured = None if experiment is None else read_experiment(experiment, experiment_unit)
    if bool(runs) == bool(modes):
        raise InputError("Give either runs or --modes.", "See `nnqmd spectrum ins --help`.")
    correction, opened = None, []
    if modes is not None:
        found, name, folder = (
            motion.from_modes(modes, modes_cell, temperature),
            modes.stem,
            out or modes.parent,
        )
        notes = [*found.notes]
    else:
        reading = sources.Reading(temperature, timestep, interval, unit, elements, drop_cut)
        opened, kelvin = sources.open_runs(runs, reading)
        name, folder = sources.name_of(opened), sources.output_folder(opened, out)
        found = motion.moved(opened, kelvin, skip, lag, window, group, state)
        notes = [*found.notes, *motion.reach_warnings(found.vibrations, min(highest, machine.highest))]
        if found.liquid and exact:
            correction, said = _correction(
                opened, found, machine, min(highest, machine.highest), skip, device
            )
            notes.append(said)
    with words.progress("scattering") as tell:
        spectrum = neutron_spectrum(
            found.vibrations,
            not found.liquid,
            not isotropic,
            highest,
            machine,
            tell,
            overrides,
            correction,
        )
    check = _debye_waller(opened, spectrum, skip)
    with words.progress("standard errors") as tell:
        errors = standard_errors(spectrum, tell)
    with words.progress("Q-E map") as tell:
        scattering = map_of(spectrum, tell) if pictures else None
    result = ins_result(spectrum, [*notes, *_warnings(spectrum)], scattering, name, errors, check)
    result = sources.with_runs(result, opened, skip)
    if measured is not None:
        result = with_experiment(result, measured, *fit_range)
    with words.progress("writing") as tell:
        written = save(result, folder, [f.value for f in formats], pictures, progress=tell)
    words.show(result, written)


def _correction(
    runs: Sequence[sources.Run],
    found: motion.Moved,
    machine: Instrument,
    highest: float,
    skip: float,
    device: str,
) -> tuple[LiquidCorrection | None, str]:
    """The correction of a liquid from the positions of the first run, or why there is none."""
    import numpy as np

    from nnqmd_server.spectra.instruments import kinematic_limits
    from nnqmd_server.spectra.liquid import correction_of

    trajectory = sources.positions(runs[0])
    often = 2 * found.vibrations.interval
    if trajectory is None or trajectory.interval > often + 1e-9:
        return None, (
            "the Gaussian approximation was not corrected for a liquid: no positions at least every "
            f"{often:g} fs; add <trajectory filename='xc' stride='...'> x_centroid{{angstrom}} </trajectory>"
        )
    _, Q = kinematic_limits(machine, np.arange(0.0, highest, 10.0))
    with words.progress("positions") as tell:
        loaded = trajectory.load(skip, tell)
    with words.progress("exact F(Q,t)") as tell:
        correction = correction_of(
            loaded.positions,
            loaded.interval,
            found.vibrations,
            largest=1.05 * float(np.nanmax(Q)),
            device=device,
            progress=tell,
        )
    return correction, f"corrected with the exact classical F(Q,t) of {trajectory.path.name}"


def _debye_waller(
    runs: Sequence[sources.Run], spectrum: NeutronSpectrum, skip: float
) -> DebyeWallerCheck | None:
    """<u^2> of a solid beside the spread of the beads, when the first run wrote them."""
    from nnqmd_server.spectra.debye_waller import debye_waller_check

    beads = sources.beads(runs[0]) if runs and spectrum.solid else None
    if beads is None:
        return None
    with words.progress("beads") as tell:
        return debye_waller_check(spectrum, beads, skip, tell)


def _warnings(spectrum: NeutronSpectrum) -> list[str]:
    from nnqmd_server.spectra.instruments import FWHM
    from nnqmd_server.units import EV_PER_INVCM

    if spectrum.vibrations.modes:
        return []
    width = spectrum.vibrations.resolution / EV_PER_INVCM
    shown = spectrum.energy[spectrum.energy >= 0]
    sharpest = FWHM * float(spectrum.instrument.width(shown).min())
    if width <= 1.2 * sharpest:
        return []
    return [
        f"the run is short: its lines are {width:.0f} cm^-1 wide (FWHM), those of "
        f"{spectrum.instrument.name} from {sharpest:.1f}; {4 * 33.4 / sharpest:.0f} ps would resolve them, "
        f"and nothing below {width:.0f} cm^-1 is known from this run"
    ]
