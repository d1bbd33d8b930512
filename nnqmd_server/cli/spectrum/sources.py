"""From what the user names to trajectories: folders of `nnqmd run`, and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nnqmd_server.errors import DataError, InputError

if TYPE_CHECKING:
    from nnqmd_server.inputs.xml import IpiInput
    from nnqmd_server.inputs.xml import Trajectory as Output
    from nnqmd_server.spectra.currents import Current
    from nnqmd_server.spectra.dipole_files import Dipoles, Polarizabilities
    from nnqmd_server.spectra.output.labelled import Result
    from nnqmd_server.spectra.trajectory import Trajectory

CONVERTED = "trajectory.h5"
"""What `nnqmd spectrum convert` leaves in a run's folder; read instead of the text when it is newer."""


@dataclass(frozen=True)
class Reading:
    """What the user says about files that do not say it themselves."""

    temperature: float | None = None
    timestep: float | None = None
    interval: float | None = None
    unit: str = ""
    elements: str = ""
    drop_cut: bool = False


@dataclass(frozen=True)
class Run:
    """One run: its folder and input, or a trajectory file."""

    path: Path
    plan: IpiInput | None
    reading: Reading

    @property
    def name(self) -> str:
        """What pictures call it."""
        return self.path.resolve().name if self.plan else self.path.stem


def open_runs(paths: Sequence[Path], reading: Reading) -> tuple[list[Run], float]:
    """The runs, and their common temperature [K]."""
    from nnqmd_server.inputs.xml import read_input

    runs = []
    for path in paths:
        if path.is_file():
            runs.append(Run(path, None, reading))
        elif (path / "input.xml").is_file():
            runs.append(Run(path, read_input(path / "input.xml"), reading))
        elif path.is_dir():
            raise InputError(
                f"{path} holds no input.xml.", "Give the folder that `nnqmd run` made, or a trajectory file."
            )
        else:
            raise InputError(f"There is no {path}.", "Give the folder that `nnqmd run` made.")
    return runs, _temperature(runs, reading)


def _temperature(runs: Sequence[Run], reading: Reading) -> float:
    if reading.temperature is not None:
        return reading.temperature
    found = {run.plan.temperature: run for run in runs if run.plan is not None}
    if not found:
        raise InputError("A trajectory file does not say its temperature.", "Give it with --temperature.")
    if len(found) > 1:
        words = ", ".join(f"{run.path}: {kelvin:g} K" for kelvin, run in found.items())
        raise InputError(
            f"These runs are of different temperatures ({words}).",
            "Make one spectrum for each temperature, or say which one with --temperature.",
        )
    kelvin = next(iter(found))
    if not kelvin > 0:
        raise InputError(f"The temperature of the run is {kelvin:g} K.", "Give one with --temperature.")
    return kelvin


def name_of(runs: Sequence[Run]) -> str:
    """What pictures call these runs together."""
    return runs[0].name if len(runs) == 1 else f"{runs[0].name} and {len(runs) - 1} more"


def with_runs(result: Result, runs: Sequence[Run], skip: float) -> Result:
    """The result with the names of its runs among its settings."""
    if not runs:
        return result
    said = {"runs": ", ".join(str(run.path) for run in runs), "left out at the start": f"{skip:g} fs"}
    return replace(result, settings={**result.settings, **said})


def output_folder(runs: Sequence[Run], out: Path | None) -> Path:
    """Where everything goes."""
    if out is not None:
        return out
    if len(runs) > 1:
        raise InputError("Several runs make one spectrum.", "Say with --out where it should go.")
    return runs[0].path if runs[0].plan else runs[0].path.parent


def velocities(run: Run) -> Trajectory:
    """The trajectory of velocities: of the centroid, or of the atoms in a classical run."""
    if run.plan is None:
        trajectory = _open_file(run)
        if trajectory.kind != "velocities":
            raise DataError(
                f"{run.path} holds {trajectory.quantity}, not velocities.",
                "Give a trajectory of velocities; i-PI writes them as v_centroid.",
            )
        return trajectory
    wanted = ["v_centroid", "velocities"] if run.plan.n_beads == 1 else ["v_centroid"]
    found = [t for name in wanted for t in run.plan.trajectories if t.quantity == name]
    advice = "Add <trajectory filename='vc' stride='2' format='xyz'> v_centroid </trajectory> and run again."
    if not found:
        raise InputError(f"{run.path / 'input.xml'} writes no {' or '.join(wanted)}.", advice)
    chosen = min(found, key=lambda t: t.stride)
    trajectory = _of_run(run, chosen)
    _check_stride(run, trajectory, chosen)
    return trajectory


def positions(run: Run) -> Trajectory | None:
    """The unwrapped positions of the centroid (of the atoms in a classical run), if the run wrote them."""
    if run.plan is None:
        return None
    wanted = ["x_centroid", "positions"] if run.plan.n_beads == 1 else ["x_centroid"]
    found = [t for name in wanted for t in run.plan.trajectories if t.quantity == name]
    if not found:
        return None
    chosen = min(found, key=lambda t: t.stride)
    if not (_text_file(run, chosen).is_file() or (run.path / CONVERTED).is_file()):
        return None
    return _of_run(run, chosen, unwrap=True)


def _of_run(run: Run, output: Output, unwrap: bool = False) -> Trajectory:
    """What a run wrote, from the converted file when it is newer than the text."""
    from nnqmd_server.spectra.trajectory import open_trajectory

    assert run.plan is not None
    text, converted = _text_file(run, output), run.path / CONVERTED
    if converted.is_file() and (not text.is_file() or converted.stat().st_mtime > text.stat().st_mtime):
        return open_trajectory(converted, quantity=output.quantity, unwrap=unwrap)
    return open_trajectory(
        text,
        run.plan.timestep,
        quantity=output.quantity,
        unit=output.unit or None,
        unwrap=unwrap,
        drop_cut=run.reading.drop_cut,
    )


def beads(run: Run) -> Trajectory | None:
    """The positions of all beads, if the run wrote them."""
    from nnqmd_server.spectra.trajectory import open_beads

    if run.plan is None or run.plan.n_beads == 1:
        return None
    found = [t for t in run.plan.trajectories if t.quantity == "positions"]
    if not found:
        return None
    chosen = min(found, key=lambda t: t.stride)
    return open_beads(
        run.path / f"{run.plan.prefix}.{chosen.filename}.{_suffix(chosen)}",
        run.plan.n_beads,
        timestep=run.plan.timestep,
        quantity="positions",
        unit=chosen.unit or None,
        unwrap=True,
        drop_cut=run.reading.drop_cut,
    )


def all_trajectories(run: Run) -> list[Trajectory]:
    """Everything a run wrote of its atoms: one trajectory per quantity."""
    from nnqmd_server.spectra.readers.units import KINDS
    from nnqmd_server.spectra.trajectory import open_beads, open_trajectory

    if run.plan is None:
        return [_open_file(run)]
    chosen: dict[str, Output] = {}
    for t in run.plan.trajectories:
        known = chosen.get(t.quantity)
        if t.quantity in KINDS and (known is None or t.stride < known.stride):
            chosen[t.quantity] = t
    if not chosen:
        raise InputError(
            f"{run.path / 'input.xml'} writes no trajectory of positions or velocities.",
            "Add <trajectory filename='vc' stride='2'> v_centroid </trajectory> and run again.",
        )
    found = []
    for quantity, t in chosen.items():
        options = {"timestep": run.plan.timestep, "quantity": quantity, "unit": t.unit or None}
        if quantity.endswith("_centroid"):
            found.append(open_trajectory(_text_file(run, t), drop_cut=run.reading.drop_cut, **options))
        else:
            stem = run.path / f"{run.plan.prefix}.{t.filename}.{_suffix(t)}"
            found.append(open_beads(stem, run.plan.n_beads, drop_cut=run.reading.drop_cut, **options))
    return found


def _open_file(run: Run) -> Trajectory:
    from nnqmd_server.spectra.trajectory import open_trajectory

    given = run.reading
    return open_trajectory(
        run.path,
        given.timestep,
        given.interval,
        unit=given.unit or None,
        symbols=[e.strip() for e in given.elements.split(",") if e.strip()],
        drop_cut=run.reading.drop_cut,
    )


def _text_file(run: Run, output: Output) -> Path:
    # i-PI numbers the files of bead quantities and pads with zeros; one bead is file 0
    number = "" if output.quantity.endswith("_centroid") else "_0"
    return run.path / f"{run.plan.prefix}.{output.filename}{number}.{_suffix(output)}"


def _suffix(output: Output) -> str:
    return {"ase": "extxyz"}.get(output.format, output.format)


def _check_stride(run: Run, trajectory: Trajectory, output: Output) -> None:
    every = trajectory.interval / run.plan.timestep
    if round(every) != output.stride:
        raise DataError(
            f"{trajectory.path} has a frame every {every:.0f} steps, the input says every {output.stride}.",
            "The input and the trajectory are from different runs: put the matching pair into the directory.",
        )


def current(run: Run, charges: Mapping[str, float], skip: float, tell: Callable[[float], None]) -> Current:
    """Current of fixed charges, from the velocities of a run."""
    import numpy as np

    from nnqmd_server.spectra.currents import current_of_charges

    trajectory = velocities(run)
    missing = sorted(set(trajectory.symbols) - set(charges))
    if missing:
        raise InputError(
            f"--charges says nothing of {', '.join(missing)}.",
            "Give a charge for every element, 0 if need be.",
        )
    cells = next(trajectory.blocks(1)).cells
    if cells is None:
        raise DataError(f"{trajectory.path} has no cell.", "Absolute absorption needs a volume.")
    volume = float(abs(np.linalg.det(cells[0])))
    each = np.array([charges[s] for s in trajectory.symbols])
    return current_of_charges(trajectory, each, volume, skip, tell)


def _needs_folder(run: Run) -> IpiInput:
    if run.plan is None:
        raise InputError(f"{run.path} is a file.", "Give the folder that `nnqmd run` made.")
    return run.plan


def polarizabilities(run: Run, extras: str, unit: str, tell: Callable[[float], None]) -> Polarizabilities:
    """Polarizabilities that i-PI wrote as extras."""
    from nnqmd_server.spectra.dipole_files import read_polarizability_extras

    plan = _needs_folder(run)
    stem = run.path / f"{plan.prefix}.{extras}"
    return read_polarizability_extras(stem, plan.timestep, unit, plan.n_beads, run.reading.drop_cut, tell)


def dipoles(run: Run, extras: str, unit: str, tell: Callable[[float], None]) -> Dipoles:
    """Dipoles that i-PI wrote as extras, or that the force door wrote during a run."""
    from nnqmd_server.spectra.dipole_files import read_dipole_extras, read_dipoles

    if run.plan is None and not extras:
        return read_dipoles(run.path)
    plan = _needs_folder(run)
    if extras:
        cells = next(velocities(run).blocks(1)).cells
        if cells is None:
            raise DataError(f"{run.path} has no cell.", "Absolute absorption needs a volume.")
        stem = run.path / f"{plan.prefix}.{extras}"
        return read_dipole_extras(
            stem, plan.timestep, cells[0], unit or None, plan.n_beads, run.reading.drop_cut, tell
        )
    found = read_dipoles(run.path / "dipoles.h5", run.plan.timestep)
    n_frames, n_beads = found.dipole.shape[:2]
    if n_frames > run.plan.n_steps + 1:
        raise DataError(
            f"dipoles.h5 holds {n_frames} force sets, but the input asks for {run.plan.n_steps} steps.",
            "One force set per step is needed: no multiple time steps, and the matching input.xml.",
        )
    if n_beads != run.plan.n_beads:
        raise DataError(
            f"dipoles.h5 holds {n_beads} beads, the input has {run.plan.n_beads}.",
            "Dipoles of every bead are needed, and the matching input.xml.",
        )
    return found
