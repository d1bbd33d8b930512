"""Stretches of frames in which correlation functions are computed one after the other.

Consecutive pieces overlap by the number of lags less one, and each frame is the time origin of one piece,
so that together they say the same as the whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nnqmd_server.errors import DataError, InputError
from nnqmd_server.spectra.trajectory import Trajectory

Array = np.ndarray

SEGMENT = 1 << 15
"""Longest stretch of frames transformed at once; longer runs are cut, with the same result."""

STREAM_BYTES = 1 << 26
"""Positions of a trajectory on disk that are in memory at once, unless the lags need more."""


class Sliceable(Protocol):
    """An array, an h5py dataset, or anything else that is read by slicing."""

    shape: tuple[int, ...]

    def __getitem__(self, key: Any) -> Array:
        """Values of a slice."""


@dataclass(frozen=True)
class Piece:
    """Frames start ... end - 1, of which those before stop are time origins."""

    start: int
    stop: int
    end: int
    values_per_atom: int
    read: Callable[[Array], Array]


def pieces(
    positions: Sliceable | Trajectory,
    kinds: Array,
    n_lags: int,
    every: int,
    until: int | None,
    progress: Callable[[float], None] | None,
) -> Iterator[Piece]:
    """Cut a run for correlation functions of ``n_lags`` lags; arguments as for `scattering_function`."""
    streamed = isinstance(positions, Trajectory)
    shape = (positions.n_atoms, 3) if streamed else tuple(positions.shape)[-2:]
    if shape != (len(kinds), 3) or (not streamed and len(positions.shape) not in (3, 4)):
        raise DataError(
            f"Positions of {shape} do not fit {len(kinds)} atoms.",
            "Give (frames, atoms, 3) or (frames, beads, atoms, 3), and one kind per atom.",
        )
    if streamed:
        if positions.kind != "positions":
            raise DataError(f"{positions.path} holds {positions.quantity}, not positions.", "Give positions.")
        yield from _streamed(positions, n_lags, every, until, progress)
        return
    n_frames = positions.shape[0]
    if n_lags > n_frames:
        raise InputError(f"{n_lags} lags do not fit {n_frames} frames.", "Ask for fewer lags.")
    last = n_frames if until is None else min(until, n_frames)
    span = _span(min(n_frames, max(SEGMENT, 4 * n_lags)), every)
    beads = int(np.prod(positions.shape[1:-2], dtype=int))
    for start in range(0, last, span):
        stop = min(start + span, last)
        end = min(stop + n_lags - 1, n_frames)

        def read(atoms: Array, start: int = start, end: int = end) -> Array:
            return np.asarray(positions[start:end, ..., atoms, :], dtype=float)

        yield Piece(start, stop, end, (end - start) * beads, read)
        if progress is not None:
            progress(stop / last)


def _streamed(
    trajectory: Trajectory,
    n_lags: int,
    every: int,
    until: int | None,
    progress: Callable[[float], None] | None,
) -> Iterator[Piece]:
    """Pieces of a trajectory on disk: memory does not grow with its frames."""
    beads = trajectory.n_beads
    span = _span(max(4 * n_lags, STREAM_BYTES // (24 * beads * trajectory.n_atoms)), every)
    kept: list[Array] = []
    start = 0

    def piece(frames: Array, stop: int, end: int) -> Piece:
        return Piece(
            start, stop, end, (end - start) * beads, lambda atoms: frames[: end - start, ..., atoms, :]
        )

    for block in trajectory.blocks(progress=progress):
        kept.append(block.values)
        while sum(map(len, kept)) >= span + n_lags - 1 and (until is None or start < until):
            frames = np.concatenate(kept)
            stop = start + span if until is None else min(start + span, until)
            yield piece(frames, stop, stop + n_lags - 1)
            start += span
            kept = [frames[span:]]
    frames = np.concatenate(kept) if kept else np.empty((0, beads, trajectory.n_atoms, 3))
    end = start + len(frames)
    stop = end if until is None else min(end, until)
    if start < stop:
        yield piece(frames, stop, min(end, stop + n_lags - 1))


def _span(frames: int, every: int) -> int:
    """A whole number of spacings of origins."""
    return every * max(1, -(-frames // every))
