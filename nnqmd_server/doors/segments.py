"""The shared memory in which i-PI 3.3 puts positions and looks for forces (``<ffsocket mode='shm'>``).

i-PI makes and removes the segments; we attach and detach. They are opened as the files that they are on
Linux and not with ``multiprocessing.shared_memory``, which would register them with Python's
resource tracker: that removes them under i-PI when our process ends.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnqmd_server.doors.wire import KINDS, Answer, InSegments
from nnqmd_server.errors import ProgramError
from nnqmd_server.structures import Array

FOLDER = Path("/dev/shm")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")


class Segments:
    """The six segments of one connection, attached.

    Parameters
    ----------
    asked : InSegments
        What i-PI said of them.

    Raises
    ------
    ProgramError
        They are not there (i-PI is on another machine), or not of the size that was said.
    """

    def __init__(self, asked: InSegments) -> None:
        count, atoms = asked.n_structures, asked.n_atoms
        shapes = {
            "pos": (count, atoms, 3),
            "h": (count, 3, 3),
            "ih": (count, 3, 3),
            "pot": (count,),
            "force": (count, atoms, 3),
            "vir": (count, 3, 3),
        }
        self.shape = (count, atoms)
        self._maps: list[mmap.mmap] = []
        self._views: dict[str, Array] = {}
        try:
            for kind, name in zip(KINDS, asked.names, strict=True):
                size = 8 * int(np.prod(shapes[kind]))
                self._maps.append(_attach(name, size))
                self._views[kind] = np.frombuffer(self._maps[-1], "<f8", size // 8).reshape(shapes[kind])
        except ProgramError:
            self.close()
            raise

    def read(self) -> tuple[Array, Array]:
        """Copies of cells (n_structures, 3, 3) and positions (n_structures, n_atoms, 3) [bohr]."""
        return self._views["h"].copy(), self._views["pos"].copy()

    def write(self, answers: Sequence[Answer]) -> None:
        """Put energies, forces and virials where i-PI looks for them."""
        energies, forces, virials, _ = zip(*answers, strict=True)
        self._views["pot"][:] = energies
        for kind, rows in (("force", forces), ("vir", virials)):
            np.concatenate(rows, out=self._views[kind].reshape(-1, 3))

    def close(self) -> None:
        """Detach; may be called twice."""
        self._views.clear()
        while self._maps:
            self._maps.pop().close()


def _attach(name: str, size: int) -> mmap.mmap:
    if not _NAME.fullmatch(name):
        raise ProgramError(f"i-PI names a shared-memory segment {name!r}.", "Use mode='unix' instead.")
    try:
        descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise ProgramError(
            f"The shared memory of i-PI cannot be opened: {error}.",
            "mode='shm' needs i-PI, of the same user, on this machine; use mode='unix' or 'inet'.",
        ) from error
    try:
        there = os.fstat(descriptor).st_size
        if there < size:
            raise ProgramError(
                f"The shared-memory segment {name} has {there} bytes, not {size}.", "Use mode='unix' instead."
            )
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
