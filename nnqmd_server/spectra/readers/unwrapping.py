"""Following atoms that were put back into the cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnqmd_server.errors import DataError

Array = np.ndarray


class Unwrapping:
    """Looks at positions block by block and undoes, or refuses, steps through the cell's boundary.

    Between two frames an atom moves far less than half a cell vector; more than that is the boundary.

    Parameters
    ----------
    path : Path
        For the message.
    undo : bool
        Whether to undo or to refuse.
    """

    def __init__(self, path: Path, undo: bool) -> None:
        self.path = path
        self.undo = undo
        self._last: Array | None = None  # fractional coordinates of the last frame, as they were read
        self._turns: Array | None = None  # whole cells by which atoms have gone further than it

    def follow(self, positions: Array, cells: Array, count: int) -> None:
        """Unwrap a block in place.

        Parameters
        ----------
        positions : Array
            [Angstrom], shape (n, n_beads, n_atoms, 3).
        cells : Array
            Cell vectors as rows [Angstrom], shape (n, 3, 3).
        count : int
            Number of the first frame, for the message.

        Raises
        ------
        DataError
            Positions are wrapped and ``undo`` is off.
        """
        inverse = np.linalg.inv(cells)
        same = (cells == cells[0]).all()
        fractional = (
            positions @ inverse[0] if same else np.einsum("tbai,tij->tbaj", positions, inverse, optimize=True)
        )
        before = fractional[:1] if self._last is None else self._last
        change = np.diff(fractional, axis=0, prepend=before)
        self._last = fractional[-1:].copy()
        crossed = np.abs(change) > 0.5
        if not self.undo and crossed.any():
            frame, bead, atom, _ = np.argwhere(crossed)[0]
            raise DataError(
                f"Frame {count + frame} of {self.path}: atom {atom}"
                + (f" of bead {bead}" if positions.shape[1] > 1 else "")
                + " moves by more than half the cell in one frame: the positions are wrapped into the cell.",
                "Follow the atoms through the boundary with unwrap=True (--unwrap).",
            )
        if not self.undo or (self._turns is None and not crossed.any()):
            return
        turns = -np.round(change).cumsum(axis=0)
        if self._turns is not None:
            turns += self._turns
        self._turns = turns[-1].copy()
        positions += turns @ cells[0] if same else np.einsum("tbai,tij->tbaj", turns, cells, optimize=True)
