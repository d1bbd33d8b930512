"""What the neutron commands share: from runs or phonon modes to densities of states, with their warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnqmd_server.cli.spectrum import options, sources, words
from nnqmd_server.cli.spectrum.options import State
from nnqmd_server.cli.terminal import console
from nnqmd_server.errors import InputError

if TYPE_CHECKING:
    from nnqmd_server.spectra.trajectory import Trajectory
    from nnqmd_server.spectra.vibrations import Vibrations


@dataclass(frozen=True)
class Moved:
    """Densities of states, whether the atoms diffuse, and what the reader should know."""

    vibrations: Vibrations
    liquid: bool
    notes: tuple[str, ...]


def lag_of(runs: Sequence[Trajectory], skip: float) -> float:
    """The window that suits the shortest of the runs [fs]."""
    from nnqmd_server.spectra.correlation import default_lag

    shortest = min((run.about_frames - 1) * run.interval for run in runs) - skip
    return default_lag(max(shortest, 0.0))


def moved(
    runs: Sequence[sources.Run],
    kelvin: float,
    skip: float,
    lag: float | None,
    window: options.Window,
    groups: Sequence[str],
    state: State = State.auto,
) -> Moved:
    """Read the velocities of the runs and correlate them."""
    from nnqmd_server.spectra.diffusion import looks_liquid
    from nnqmd_server.spectra.vibrations import densities_of_states

    trajectories = [sources.velocities(run) for run in runs]
    with words.progress("velocities") as tell:
        vibrations = densities_of_states(
            trajectories,
            kelvin,
            lag or lag_of(trajectories, skip),
            options.groups(groups),
            window.value,
            skip,
            tell,
        )
    if state == State.auto:
        with console.status("solid or liquid?"):
            liquid, numbers = looks_liquid(trajectories[0], skip)
        how = f"{numbers}; --state changes this"
    else:
        liquid, how = state == State.liquid, "chosen by --state"
    notes = [w for t in trajectories for w in t.warnings]
    notes.append(f"treated as a {'liquid' if liquid else 'solid'} ({how})")
    if trajectories[0].quantity != "v_centroid":
        notes.append("classical velocities: the same as the harmonic quantum correction of a classical run")
    return Moved(vibrations, liquid, (*notes, *warnings(vibrations)))


def warnings(v: Vibrations) -> list[str]:
    """What is doubtful about densities of states."""
    found = []
    if v.n_blocks < 5:
        found.append("fewer than 5 blocks: standard errors are " + ("missing" if v.n_blocks < 2 else "rough"))
    for element in v.elements:
        if abs(element.kinetic_ratio - 1) > 0.1:
            found.append(
                f"the {element.label} atoms move as at {element.kinetic_ratio * v.temperature:.0f} K, "
                f"not at {v.temperature:g} K: not in equilibrium, too short, or another temperature"
            )
        if element.clipped > 0.03:  # the side lobes of the window around sharp lines reach 2 %
            found.append(
                f"{100 * element.clipped:.1f} % negative density was removed for {element.label}: "
                "noise, which a longer run or a shorter --lag lowers, or side lobes of --window none"
            )
    return found


def reach_warnings(v: Vibrations, highest: float) -> list[str]:
    """What is doubtful about the range of energies, up to ``highest`` [cm^-1]."""
    from nnqmd_server.units import EV_PER_INVCM

    limit = v.highest / EV_PER_INVCM
    if highest > 0.9 * limit:
        return [f"frames every {v.interval:g} fs reach only {limit:.0f} cm^-1: write velocities more often"]
    return []


def from_modes(path: Path, cell: Path | None, temperature: float | None) -> Moved:
    """Densities of states of phonon modes."""
    from nnqmd_server.spectra.modes import read_modes, vibrations_of_modes

    if temperature is None:
        raise InputError("Phonon modes have no temperature.", "Give one with --temperature.")
    with words.progress("phonon modes"):
        modes = read_modes(path, cell)
        return Moved(vibrations_of_modes(modes, temperature), False, tuple(modes.warnings))
