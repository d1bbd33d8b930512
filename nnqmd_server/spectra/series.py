"""Trajectories in memory, at even times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnqmd_server.errors import DataError

Array = np.ndarray

MINIMUM_FRAMES = 64
"""Fewer frames than this are not a time series that a spectrum could come from."""


@dataclass(frozen=True)
class Velocities:
    """Velocities at even times, in memory.

    Parameters
    ----------
    symbols : tuple of str
        i-PI's atom labels, length n_atoms.
    velocities : Array
        Velocities [Angstrom/fs], shape (n_frames, n_atoms, 3).
    steps : Array
        Molecular-dynamics step of each frame, int64, shape (n_frames,).
    interval : float
        Time between frames [fs].
    quantity : str
        What i-PI calls them: ``v_centroid`` or ``velocities``.
    warnings : tuple of str
        What the reader tolerated.
    """

    symbols: tuple[str, ...]
    velocities: Array
    steps: Array
    interval: float
    quantity: str
    warnings: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Time from the first to the last frame [fs]."""
        return (len(self.steps) - 1) * self.interval

    def after(self, skip: float) -> Velocities:
        """The same trajectory without its first ``skip`` [fs]."""
        first = first_frame(skip, self.interval, len(self.steps))
        return replace(self, velocities=self.velocities[first:], steps=self.steps[first:])


@dataclass(frozen=True)
class Positions:
    """Positions at even times, in memory; atoms are followed through the cell's boundary.

    Parameters
    ----------
    symbols : tuple of str
        i-PI's atom labels, length n_atoms.
    positions : Array
        [Angstrom], shape (n_frames, n_atoms, 3).
    steps : Array
        Molecular-dynamics step of each frame, int64, shape (n_frames,).
    interval : float
        Time between frames [fs].
    quantity : str
        ``x_centroid`` or ``positions``.
    cells : Array or None
        Cell vectors as rows [Angstrom], shape (n_frames, 3, 3).
    warnings : tuple of str
        What the reader tolerated.
    """

    symbols: tuple[str, ...]
    positions: Array
    steps: Array
    interval: float
    quantity: str
    cells: Array | None
    warnings: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Time from the first to the last frame [fs]."""
        return (len(self.steps) - 1) * self.interval


def check_enough(path: Path, n_frames: int) -> None:
    """Refuse a run that is too short to be a time series."""
    if n_frames < MINIMUM_FRAMES:
        raise DataError(
            f"{path} holds {n_frames} whole frames; a spectrum needs at least {MINIMUM_FRAMES}.",
            "Run longer, or write the trajectory more often (smaller stride).",
        )


def first_frame(skip: float, interval: float, n_frames: int) -> int:
    """Frames to leave out for a skip [fs], which must leave enough of the run."""
    first = int(np.ceil(skip / interval - 1e-9))
    if skip < 0 or n_frames - first < MINIMUM_FRAMES:
        raise DataError(
            f"Skipping {skip:g} fs of a run of {(n_frames - 1) * interval:g} fs leaves "
            f"{max(0, n_frames - first)} frames; at least {MINIMUM_FRAMES} are needed.",
            "Skip less, or run longer.",
        )
    return first
