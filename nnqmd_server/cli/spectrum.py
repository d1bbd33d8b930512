"""``nnqmd spectrum``: neutron and infrared spectra of a finished run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from nnqmd_server.cli.terminal import console
from nnqmd_server.errors import DataError, InputError, OutputError

if TYPE_CHECKING:
    from nnqmd_server.inputs.xml import IpiInput
    from nnqmd_server.spectra.inelastic import NeutronSpectrum
    from nnqmd_server.spectra.infrared import InfraredSpectrum
    from nnqmd_server.spectra.trajectory import Velocities
    from nnqmd_server.structures import Array

app = typer.Typer(
    help="Neutron (ins) and infrared (ir) spectra of a finished run, as pictures and tables.",
    no_args_is_help=True,
)

INS_EXAMPLES = """
Examples:

  nnqmd spectrum ins runs/ammonia

  nnqmd spectrum ins runs/ammonia --skip 2000 --out results

  nnqmd spectrum ins runs/liquid --state liquid --lag 3000
"""

IR_EXAMPLES = """
Examples:

  nnqmd spectrum ir runs/ammonia

  nnqmd spectrum ir runs/ammonia --skip 2000 --lag 1500 --highest 3800
"""


class State(StrEnum):
    """How slow motion is treated."""

    auto = "auto"
    solid = "solid"
    liquid = "liquid"


RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder that `nnqmd run` made")]
Temperature = Annotated[float | None, typer.Option(help="temperature in K; the run's own by default")]
Skip = Annotated[float, typer.Option(help="fs at the start of the run to leave out")]
Lag = Annotated[float | None, typer.Option(help="length of the correlation window in fs; chosen by default")]
Highest = Annotated[float, typer.Option(help="last energy or wavenumber in cm^-1")]
Out = Annotated[Path | None, typer.Option(help="folder for picture and table; RUN_DIR by default")]


@app.command(epilog=INS_EXAMPLES)
def ins(
    run_dir: RunDir,
    temperature: Temperature = None,
    skip: Skip = 0.0,
    lag: Lag = None,
    highest: Highest = 4000.0,
    state: Annotated[
        State, typer.Option(help="solid: sharp elastic line; liquid: quasi-elastic line; auto: look")
    ] = State.auto,
    isotropic: Annotated[
        bool,
        typer.Option("--isotropic", help="average directions before, not after, the Debye-Waller factor"),
    ] = False,
    out: Out = None,
) -> None:
    """Inelastic neutron scattering on VISION, all orders, from the centroid velocities."""
    from nnqmd_server.spectra.correlation import default_lag
    from nnqmd_server.spectra.inelastic import neutron_spectrum
    from nnqmd_server.spectra.plot import plot_ins
    from nnqmd_server.spectra.tables import write_ins
    from nnqmd_server.spectra.vibrations import densities_of_states, looks_liquid

    plan, kelvin, folder = _prepare(run_dir, temperature, skip, lag, highest, out)
    with _progress("reading velocities") as tell:
        velocities = _velocities(run_dir, plan, tell).after(skip)
    liquid, numbers = looks_liquid(velocities)
    if state != State.auto:
        liquid = state == State.liquid
    vibrations = densities_of_states(velocities, kelvin, lag or default_lag(velocities.duration))
    with _progress("scattering") as tell:
        spectrum = neutron_spectrum(vibrations, not liquid, not isotropic, highest, progress=tell)
    how = "chosen by --state" if state != State.auto else f"{numbers}; --state changes this"
    notes = [*velocities.warnings, f"treated as a {'liquid' if liquid else 'solid'} ({how})"]
    notes += _ins_warnings(spectrum)
    if velocities.quantity != "v_centroid":
        notes.append("classical velocities: the same as the harmonic quantum correction of a classical run")
    write_ins(folder / "ins.txt", spectrum, notes)
    plot_ins(folder / "ins.png", spectrum, run_dir.resolve().name)
    _show_ins(spectrum, notes, folder)


@app.command(epilog=IR_EXAMPLES)
def ir(
    run_dir: RunDir,
    temperature: Temperature = None,
    skip: Skip = 0.0,
    lag: Lag = None,
    highest: Highest = 4000.0,
    out: Out = None,
) -> None:
    """Infrared absorption n(w)alpha(w) in cm^-1, from the bead-averaged dipoles."""
    from nnqmd_server.spectra.correlation import default_lag
    from nnqmd_server.spectra.infrared import infrared_spectrum
    from nnqmd_server.spectra.plot import plot_ir
    from nnqmd_server.spectra.tables import write_ir
    from nnqmd_server.spectra.trajectory import read_dipoles

    plan, kelvin, folder = _prepare(run_dir, temperature, skip, lag, highest, out)
    dipoles = read_dipoles(run_dir / "dipoles.h5", plan.timestep)
    _check_dipoles(dipoles.dipole.shape, plan)
    dipoles = dipoles.after(skip)
    spectrum = infrared_spectrum(dipoles, kelvin, lag or default_lag(dipoles.duration), highest)
    notes = _ir_warnings(spectrum)
    write_ir(folder / "ir.txt", spectrum, notes)
    plot_ir(folder / "ir.png", spectrum, run_dir.resolve().name)
    _show_ir(spectrum, notes, folder)


def _prepare(
    run_dir: Path, temperature: float | None, skip: float, lag: float | None, highest: float, out: Path | None
) -> tuple[IpiInput, float, Path]:
    from nnqmd_server.inputs.xml import read_input

    if not (run_dir / "input.xml").is_file():
        raise InputError(f"{run_dir} holds no input.xml.", "Give the folder that `nnqmd run` made.")
    for name, value in (("--temperature", temperature), ("--lag", lag)):
        if value is not None and not 0 < value < 1e9:
            raise InputError(f"{name} {value:g} makes no sense.", "Give a positive number.")
    if not 0 <= skip < 1e12:
        raise InputError(f"--skip {skip:g} makes no sense.", "Give a time in fs, 0 or more.")
    if not 100 <= highest <= 6000:
        raise InputError(f"--highest {highest:g} makes no sense.", "Give between 100 and 6000 cm^-1.")
    plan = read_input(run_dir / "input.xml")
    kelvin = plan.temperature if temperature is None else temperature
    if not kelvin > 0:
        raise InputError(f"The temperature of the run is {kelvin:g} K.", "Give one with --temperature.")
    folder = out or run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made ({error}).", "Choose another directory with --out."
        ) from error
    return plan, kelvin, folder


def _velocities(run_dir: Path, plan: IpiInput, tell: Callable[[float], None]) -> Velocities:
    from nnqmd_server.spectra.trajectory import read_velocities

    wanted = ["v_centroid", "velocities"] if plan.n_beads == 1 else ["v_centroid"]
    found = [t for name in wanted for t in plan.trajectories if t.quantity == name]
    advice = "Add <trajectory filename='vc' stride='2' format='xyz'> v_centroid </trajectory> and run again."
    if not found:
        raise InputError(f"{run_dir / 'input.xml'} writes no {' or '.join(wanted)}.", advice)
    chosen = min(found, key=lambda t: (t.format != "xyz", t.stride))
    if chosen.format != "xyz":
        raise InputError(f"The velocities of this run are in {chosen.format!r} format.", advice)
    # i-PI numbers the files of bead quantities and pads with zeros; one bead is file 0
    suffix = "_0" if chosen.quantity == "velocities" else ""
    path = run_dir / f"{plan.prefix}.{chosen.filename}{suffix}.xyz"
    velocities = read_velocities(path, plan.timestep, chosen.unit, tell)
    if round(velocities.interval / plan.timestep) != chosen.stride:
        raise DataError(
            f"{path} has a frame every {velocities.interval / plan.timestep:.0f} steps, "
            f"the input says every {chosen.stride}.",
            "The input and the trajectory are from different runs: put the matching pair into the directory.",
        )
    return velocities


def _ins_warnings(spectrum: NeutronSpectrum) -> list[str]:
    from nnqmd_server.units import EV_PER_INVCM

    v = spectrum.vibrations
    warnings = []
    width, limit = v.resolution / EV_PER_INVCM, v.highest / EV_PER_INVCM
    sharpest = 2.355 * spectrum.instrument.sigma[0]
    if width > 1.2 * sharpest:
        warnings.append(
            f"the run is short: its lines are {width:.0f} cm^-1 wide (FWHM), those of "
            f"{spectrum.instrument.name} from {sharpest:.1f}; 24 ps would resolve them, and nothing below "
            f"{width:.0f} cm^-1 is known from this run"
        )
    if v.n_blocks < 5:
        warnings.append(
            "fewer than 5 blocks: standard errors are " + ("missing" if v.n_blocks < 2 else "rough")
        )
    if spectrum.energy[-1] > 0.9 * limit:
        warnings.append(
            f"frames every {v.interval:g} fs reach only {limit:.0f} cm^-1: write velocities more often"
        )
    for element in v.elements:
        if abs(element.kinetic_ratio - 1) > 0.1:
            warnings.append(
                f"the {element.symbol} atoms move as at {element.kinetic_ratio * v.temperature:.0f} K, "
                f"not at {v.temperature:g} K: not in equilibrium, too short, or another temperature"
            )
        if element.clipped > 0.03:  # the side lobes of the window around sharp lines reach 2 %
            warnings.append(
                f"{100 * element.clipped:.1f} % negative density was removed for {element.symbol}: "
                "noise, which a longer run or a shorter --lag lowers"
            )
    return warnings


def _check_dipoles(shape: tuple[int, ...], plan: IpiInput) -> None:
    if shape[0] > plan.n_steps + 1:
        raise DataError(
            f"dipoles.h5 holds {shape[0]} force sets, but the input asks for {plan.n_steps} steps.",
            "One force set per step is needed: no multiple time steps, and the matching input.xml.",
        )
    if shape[1] != plan.n_beads:
        raise DataError(
            f"dipoles.h5 holds {shape[1]} beads, the input has {plan.n_beads}.",
            "Dipoles of every bead are needed, and the matching input.xml.",
        )


def _ir_warnings(spectrum: InfraredSpectrum) -> list[str]:
    warnings = []
    if spectrum.resolution > 10:
        warnings.append(
            f"the run is short: its lines are {spectrum.resolution:.0f} cm^-1 wide (FWHM), and nothing "
            "below that wavenumber is known from it"
        )
    if spectrum.n_blocks < 5:
        warnings.append(
            "fewer than 5 blocks: standard errors are " + ("missing" if spectrum.n_blocks < 2 else "rough")
        )
    if spectrum.n_jumps:
        warnings.append(f"{spectrum.n_jumps} jumps of the dipole by e times cell vectors were removed")
    return warnings


def _show_ins(spectrum: NeutronSpectrum, notes: list[str], folder: Path) -> None:
    v = spectrum.vibrations
    table = Table(box=None, pad_edge=False)
    for column in ("element", "<u^2> (A^2)", "kinetic energy (meV)", "effective T (K)", "sigma (barn)"):
        table.add_column(column, justify="right")
    for part, element in zip(spectrum.elements, v.elements, strict=True):
        table.add_row(
            part.symbol,
            f"{part.displacement:.4f}",
            f"{1e3 * part.kinetic_energy:.1f}",
            f"{element.kinetic_ratio * v.temperature:.1f}",
            f"{part.cross_section:.3g}",
        )
    console.print(table)
    bank = spectrum.instrument.banks[0].name
    console.print(f"peaks ({bank}): {_peaks(spectrum.energy, spectrum.total[0], above=25.0)} cm^-1")
    _say(notes, folder / "ins.png", folder / "ins.txt")


def _show_ir(spectrum: InfraredSpectrum, notes: list[str], folder: Path) -> None:
    console.print(
        f"{spectrum.duration / 1000:.3g} ps, {spectrum.n_beads} bead{'s' if spectrum.n_beads > 1 else ''}, "
        f"{spectrum.temperature:g} K, {spectrum.volume:.1f} A^3; lines {spectrum.resolution:.1f} cm^-1 wide "
        "(FWHM)"
    )
    console.print(f"peaks: {_peaks(spectrum.wavenumber, spectrum.absorption, above=25.0)} cm^-1")
    console.print(
        f"sum rule: {spectrum.measured_sum:.5g} cm^-2 from the spectrum, "
        f"{spectrum.expected_sum:.5g} from <J^2>"
    )
    _say(notes, folder / "ir.png", folder / "ir.txt")


def _peaks(energy: Array, values: Array, above: float) -> str:
    from scipy.signal import find_peaks

    seen = energy > above
    where, found = find_peaks(values[seen], prominence=0.05 * values[seen].max())
    strongest = sorted(where[found["prominences"].argsort()[::-1][:8]])
    return ", ".join(f"{energy[seen][k]:.0f}" for k in strongest) or "none"


def _say(notes: list[str], *paths: Path) -> None:
    for note in notes:
        console.print(f"[yellow]note:[/] {note}")
    for path in paths:
        console.print(f"wrote [bold]{path}[/]")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[float], None]]:
    """A bar from 0 to 1, which goes away when done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda done: bar.update(task, completed=done)
