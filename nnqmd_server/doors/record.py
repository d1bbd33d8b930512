"""The dipoles of every bead in one HDF5 file, since i-PI's own per-bead text files cost far more."""

from __future__ import annotations

import errno
import math
import shutil
import threading
import time
from pathlib import Path

import h5py
import numpy as np

from nnqmd_server.errors import OutputError
from nnqmd_server.structures import Array

FORMAT = "nnqmd dipoles 1"
_FLUSH_SECONDS = 2.0
_FLUSH_SETS = 200
_CHUNK = 256
_MARGIN = 1 << 17  # bytes for HDF5's own tables


class DipoleRecord:
    """Appends one row per force set; written to disk every few seconds.

    Datasets: ``force_set`` (n,), its number, with a gap where one was skipped, ``dipole``
    (n, n_beads, 3) [e Angstrom], ``energy`` (n, n_beads) [eV], ``cell`` (n, 3, 3) [Angstrom], vectors as
    rows.

    Parameters
    ----------
    path : Path
        The file; replaced when it exists.
    n_beads : int
        Beads per force set.
    model : str
        SHA-256 of the model.
    """

    def __init__(self, path: Path, n_beads: int, model: str) -> None:
        self.path = path
        self._waiting: list[tuple[Array, Array, Array, int]] = []
        self._count = 0
        self._lock = threading.Lock()
        self._force_set = 0
        self.skipped = 0
        self._written = time.monotonic()
        shapes = {"force_set": (), "dipole": (n_beads, 3), "energy": (n_beads,), "cell": (3, 3)}
        self._chunk_bytes = 8 * _CHUNK * sum(math.prod(shape) for shape in shapes.values())
        self._need_room()
        try:
            self._file = h5py.File(path, "w")
        except OSError as error:
            raise self._cannot_write(error) from error
        self._file.attrs.update({"format": FORMAT, "model_sha256": model, "n_beads": n_beads})
        units = {"force_set": "", "dipole": "e Angstrom", "energy": "eV", "cell": "Angstrom"}
        for name, shape in shapes.items():
            kind = np.int64 if name == "force_set" else np.float64
            data = self._file.create_dataset(
                name, (0, *shape), kind, maxshape=(None, *shape), chunks=(_CHUNK, *shape)
            )
            data.attrs["unit"] = units[name]

    def append(self, dipole: Array, energy: Array, cell: Array) -> None:
        """Add one force set: dipoles (n_beads, 3), energies (n_beads,), cell (3, 3).

        Raises
        ------
        OutputError
            The disk is full or has gone away.
        """
        with self._lock:
            self._waiting.append((dipole, energy, cell, self._force_set))
            self._force_set += 1
            if len(self._waiting) >= _FLUSH_SETS or time.monotonic() - self._written > _FLUSH_SECONDS:
                self._flush()

    def skip(self) -> None:
        """Leave out a force set that is not complete."""
        with self._lock:
            self.skipped += 1
            self._force_set += 1

    def _flush(self) -> None:
        self._written = time.monotonic()
        if not self._waiting or not self._file:
            return
        self._need_room()
        first, last = self._count, self._count + len(self._waiting)
        names = ("dipole", "energy", "cell", "force_set")
        columns = dict(zip(names, map(np.array, zip(*self._waiting, strict=True)), strict=True))
        try:
            for name, rows in columns.items():
                self._file[name].resize(last, axis=0)
                self._file[name][first:last] = rows
            self._file.flush()
        except (OSError, RuntimeError) as error:
            raise self._cannot_write(error) from error
        self._count, self._waiting = last, []

    def _cannot_write(self, error: OSError | RuntimeError) -> OutputError:
        # HDF5 does not always set errno.
        full = getattr(error, "errno", 0) == errno.ENOSPC or "No space left" in str(error)
        fix = "Make room on the disk." if full else "Choose a folder that is writable."
        reason = str(error).splitlines()[0]  # HDF5 goes on for lines about addresses in memory
        return OutputError(f"Cannot write {self.path}: {reason}.", fix)

    def close(self) -> None:
        """Write what is waiting and close the file; may be called twice, and from another thread.

        Raises
        ------
        OutputError
            The disk is full or has gone away.
        """
        with self._lock:
            if self._file:
                try:
                    self._flush()
                finally:
                    self._close_file()

    def _need_room(self) -> None:
        # A file that HDF5 could not write cannot be closed either, and takes the process down when it
        # ends: it is never asked to write onto a disk that is about to be full.
        try:
            free = shutil.disk_usage(self.path.parent).free
        except OSError as error:
            raise self._cannot_write(error) from error
        if free < (2 + len(self._waiting) // _CHUNK) * self._chunk_bytes + _MARGIN:
            self._waiting = []
            raise OutputError(
                f"The disk of {self.path} is full ({free / 1e6:.1f} MB are left).", "Make room on the disk."
            )

    def _close_file(self) -> None:
        try:
            self._file.close()
        except (OSError, RuntimeError) as error:  # h5py raises either for a disk that is full
            raise self._cannot_write(error) from error
