"""What every reader of a trajectory format gives, and the errors that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnqmd_server.errors import DataError

Array = np.ndarray


@dataclass(frozen=True)
class Frames:
    """Some frames that follow each other, in the file's own units.

    Parameters
    ----------
    values : Array
        Shape (n, n_beads, n_atoms, 3).
    steps : Array
        Molecular-dynamics steps, or the numbers of the frames where the file has no steps; int64, (n,).
    cells : Array or None
        Cell vectors as rows, shape (n, 3, 3).
    done : float
        Fraction of the file that has been read.
    """

    values: Array
    steps: Array
    cells: Array | None
    done: float


@dataclass(frozen=True)
class Source:
    """A trajectory file whose head has been read.

    Parameters
    ----------
    path : Path
        The file.
    symbols : tuple of str
        Atom labels.
    quantity : str
        i-PI's name of what is in it, or "" when the file does not say.
    unit, cell_unit : str
        As the file says it; "" when it does not.
    frames : callable
        ``frames(n, atoms)`` iterates over the file from its beginning, at most n frames at a time;
        ``atoms`` is an index array or None for all atoms.
    has_steps : bool
        Whether the file numbers its frames by simulation steps.
    n_beads : int
        Beads in this file.
    n_frames : int or None
        None when only reading would tell.
    about : int
        Number of frames, estimated from the size of the file and of its first frame.
    interval : float or None
        Time between frames [fs] where the file says it.
    digits : int
        Significant digits of its numbers; 16 where nothing limits them.
    scaled : bool
        Whether the reader has used up the caller's unit (LAMMPS' unit styles) and says the result's.
    warnings : list of str
        What was tolerated; filled while reading.
    """

    path: Path
    symbols: tuple[str, ...]
    quantity: str
    unit: str
    cell_unit: str
    frames: Callable[[int, Array | None], Iterator[Frames]]
    has_steps: bool
    warnings: list[str]
    n_beads: int = 1
    n_frames: int | None = None
    about: int = 0
    interval: float | None = None
    digits: int = 16
    scaled: bool = False


def cut_frame(path: Path, frame: int) -> DataError:
    """The error for a file that ends within a frame."""
    return DataError(
        f"Frame {frame} of {path}, the last one, is cut off: the run was stopped while writing it.",
        "Leave it out with drop_cut=True (--drop-cut), or use the output of a run that ended.",
    )


def not_a_frame(path: Path, frame: int, kind: str, why: str) -> DataError:
    """The error for a frame that cannot be understood."""
    return DataError(
        f"Frame {frame} of {path} is not {kind} frame: {why}.",
        "Use the file as it was written; after a kill and restart, cut the broken part out.",
    )


def other_contents(path: Path, frame: int, found: str, first: str) -> DataError:
    """The error for a frame that does not belong to the first one."""
    return DataError(
        f"Frame {frame} of {path} has other contents ({found}) than the first frame ({first}).",
        "Two runs seem to have written into this file: run again into an empty folder, or cut the file "
        "where the second run begins.",
    )


def empty_file(path: Path, why: str = "it holds no frame") -> DataError:
    """The error for a file without a single whole frame."""
    return DataError(
        f"{path} is empty: {why}.",
        "Check that the run wrote this output, and that it ran beyond the first stride.",
    )
