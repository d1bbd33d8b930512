"""The Debye-Waller factor twice: from the density of states, and from the spread of the whole ring polymer.

The spectrum takes <u^2> from centroid velocities, with coth in place of 2kT/E; that is exact for harmonic
motion. The beads of the same run sample the quantum distribution of the positions whatever the potential:

    <u^2> = (1/3) <|r_k - <r>|^2>     over all beads k and times, <r> the mean over beads and time

needs no such assumption, in a solid. Where the two differ the motion is anharmonic, or the run too short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.inelastic import NeutronSpectrum
from nnqmd_server.spectra.trajectory import Trajectory

Array = np.ndarray

TOLERANCE = 0.10
"""Relative difference that is reported."""


@dataclass(frozen=True)
class DebyeWallerCheck:
    """<u^2> along Q of every element or group, two ways.

    Parameters
    ----------
    labels : tuple of str
        Elements and groups, as in the spectrum.
    from_density : Array
        From the density of states [Angstrom^2], shape (n_elements,).
    from_beads : Array
        From the spread of the beads [Angstrom^2], shape (n_elements,).
    n_beads, n_frames : int
        What was read.
    warnings : tuple of str
        A line for every element whose values differ by more than `TOLERANCE`, and doubts about the beads.
    """

    labels: tuple[str, ...]
    from_density: Array
    from_beads: Array
    n_beads: int
    n_frames: int
    warnings: tuple[str, ...]

    @property
    def difference(self) -> Array:
        """Relative difference, (density - beads) / beads, shape (n_elements,)."""
        return self.from_density / self.from_beads - 1


def bead_spread(
    beads: Trajectory, skip: float = 0.0, progress: Callable[[float], None] | None = None
) -> tuple[Array, int]:
    """(1/3) <|r_k - <r>|^2> of every atom over all beads and frames, read as a stream.

    Parameters
    ----------
    beads : Trajectory
        Positions of all beads (`open_beads`), atoms followed through the cell's boundary.
    skip : float
        Time at the beginning to leave out [fs].
    progress : callable, optional
        Called with the fraction read.

    Returns
    -------
    spread : Array
        [Angstrom^2], shape (n_atoms,).
    n_frames : int
        Frames read.
    """
    if beads.kind != "positions":
        raise DataError(
            f"{beads.path} holds {beads.quantity}, not positions.",
            "Write positions: <trajectory filename='pos' stride='100'> positions{angstrom} </trajectory>.",
        )
    first = None
    total, square, count = 0.0, 0.0, 0
    for block in beads.blocks(skip=skip, progress=progress):
        if first is None:
            first = block.values[0].mean(axis=0)
        away = block.values - first
        total = total + away.sum(axis=(0, 1))
        square = square + (away**2).sum(axis=(0, 1, 3))
        count += len(away)
    n = count * beads.n_beads
    return (square / n - ((total / n) ** 2).sum(axis=-1)) / 3, count


def debye_waller_check(
    spectrum: NeutronSpectrum,
    beads: Trajectory,
    skip: float = 0.0,
    progress: Callable[[float], None] | None = None,
) -> DebyeWallerCheck:
    """Compare the <u^2> of a solid's spectrum with the spread of the beads of its run.

    Parameters
    ----------
    spectrum : NeutronSpectrum
        Of a solid.
    beads, skip, progress
        As for `bead_spread`.
    """
    if not spectrum.solid:
        raise DataError("A liquid has no Debye-Waller factor.", "Compare solids only.")
    spread, n_frames = bead_spread(beads, skip, progress)
    elements = spectrum.vibrations.elements
    if any(e.atoms is None or e.atoms.max() >= len(spread) for e in elements):
        raise DataError("The beads have other atoms than the velocities.", "Take both from the same run.")
    found = np.array([spread[e.atoms].mean() for e in elements])
    expected = np.array([part.displacement for part in spectrum.elements])
    labels = tuple(e.label for e in elements)
    warnings = [
        f"<u^2> of {label} is {a:.4f} A^2 from the density of states and {b:.4f} A^2 from the beads "
        f"({100 * (a / b - 1):+.0f} %): anharmonic, not in equilibrium, or too short a run"
        for label, a, b in zip(labels, expected, found, strict=True)
        if abs(a / b - 1) > TOLERANCE
    ]
    if beads.n_beads == 1:
        warnings.append("one bead only: its spread is that of classical motion")
    return DebyeWallerCheck(labels, expected, found, beads.n_beads, n_frames, tuple(warnings))
