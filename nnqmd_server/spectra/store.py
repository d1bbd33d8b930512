"""One compact HDF5 file per run: what was read from text once is not parsed again.

One group per quantity, named as i-PI names it, with the datasets ``values`` (n_frames, n_beads, n_atoms, 3),
``step`` (n_frames,), ``cell`` (n_frames or 1, 3, 3; vectors as rows; absent without a cell) and ``symbol``
(n_atoms,). Units are attributes: Angstrom, Angstrom/fs, e; the group's attribute ``interval_fs`` is the
time between frames. Numbers of at most seven digits, such as i-PI's six, are kept in single precision,
whose error is a hundredth of their own rounding.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from nnqmd_server.errors import DataError, OutputError
from nnqmd_server.spectra.readers.source import Array, Frames, Source, empty_file
from nnqmd_server.spectra.trajectory import Block, Progress, Trajectory

FORMAT = "nnqmd trajectory 1"
UNITS = {"positions": "angstrom", "velocities": "angstrom/fs", "charges": "e"}
_SINGLE_DIGITS = 7
_CHUNK_BYTES = 1 << 17
_MARGIN = 1 << 20  # bytes for HDF5's own tables


def convert(
    trajectories: Trajectory | Sequence[Trajectory], path: str | Path, progress: Progress | None = None
) -> Path:
    """Write trajectories of one run into one HDF5 file, which `open_trajectory` reads.

    The file appears under its name only when it is complete.

    Parameters
    ----------
    trajectories : Trajectory or sequence of Trajectory
        Different quantities of the same atoms.
    path : path
        The file to write; one that is there is replaced.
    progress : callable, optional
        Called with the fraction done.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    DataError
        A trajectory cannot be read, two hold the same quantity, or their atoms differ.
    OutputError
        The file cannot be written; the disk is full.
    """
    several = [trajectories] if isinstance(trajectories, Trajectory) else list(trajectories)
    path = Path(path)
    _check_one_run(several)
    part = path.with_name(path.name + ".part")
    try:
        try:
            with h5py.File(part, "w") as file:
                file.attrs["format"] = FORMAT
                for k, trajectory in enumerate(several):
                    tell = partial(_tell, progress, k, len(several))
                    _write(file.create_group(trajectory.quantity), trajectory, part, tell)
            part.replace(path)
        except (OSError, RuntimeError) as error:  # h5py raises either
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OutputError(
                f"{path} cannot be written ({reason}).", "Choose a folder that is writable and has room."
            ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _tell(progress: Progress | None, k: int, count: int, done: float) -> None:
    if progress is not None:
        progress((k + done) / count)


def _check_one_run(several: Sequence[Trajectory]) -> None:
    if not several:
        raise DataError("No trajectory was given.", "Name at least one file to convert.")
    seen: dict[str, Trajectory] = {}
    for trajectory in several:
        if trajectory.symbols != several[0].symbols:
            raise DataError(
                f"{trajectory.path} has other atoms than {several[0].path}.", "Convert every run by itself."
            )
        if trajectory.quantity in seen:
            raise DataError(
                f"{trajectory.path} and {seen[trajectory.quantity].path} both hold {trajectory.quantity}.",
                "Convert every run by itself; beads of one run are opened together.",
            )
        seen[trajectory.quantity] = trajectory


def _write(group: h5py.Group, trajectory: Trajectory, part: Path, progress: Progress) -> None:
    digits = max(source.digits for source in trajectory.sources)
    kind = np.float32 if digits <= _SINGLE_DIGITS else np.float64
    shape = (trajectory.n_beads, trajectory.n_atoms, 3)
    # a chunk serves both ways of reading: some frames of all atoms, all frames of some atoms
    atoms = min(trajectory.n_atoms, 32)
    frames = max(16, _CHUNK_BYTES // (trajectory.n_beads * atoms * 3 * np.dtype(kind).itemsize))
    values = group.create_dataset(
        "values", (0, *shape), kind, maxshape=(None, *shape), chunks=(frames, trajectory.n_beads, atoms, 3)
    )
    values.attrs["unit"] = UNITS[trajectory.kind]
    group.attrs["interval_fs"] = trajectory.interval
    group.attrs["source"] = ", ".join(source.path.name for source in trajectory.sources)
    group.attrs["digits"] = digits
    group["symbol"] = np.array(trajectory.symbols, dtype="S8")
    steps: list[Array] = []
    cells: list[Array] = []
    for block in _in_chunks(trajectory, frames, progress):
        _need_room(part, block)
        first = len(values)
        values.resize(first + len(block.steps), axis=0)
        values[first:] = block.values
        steps.append(block.steps)
        if block.cells is not None:
            # a constant cell is kept once
            constant = (block.cells == block.cells[0]).all() and len(cells) < 2
            constant = constant and (not cells or (cells[0] == block.cells[0]).all())
            if constant and (not cells or len(cells[0]) == 1):
                cells = cells or [block.cells[:1]]
                continue
            if cells and len(cells) == 1 and len(cells[0]) == 1:
                cells = [np.repeat(cells[0], first, axis=0)]
            cells.append(block.cells)
    group["step"] = np.concatenate(steps)
    if cells:
        group["cell"] = np.concatenate(cells)
        group["cell"].attrs["unit"] = "angstrom"


def _in_chunks(trajectory: Trajectory, frames: int, progress: Progress) -> Iterator[Block]:
    """Blocks of whole chunks, so that none is written twice."""
    bytes_per_frame = 24 * trajectory.n_beads * trajectory.n_atoms
    chunks = max(1, (1 << 24) // (bytes_per_frame * frames))
    return trajectory.blocks(chunks * frames, progress=progress)


def _need_room(part: Path, block: Block) -> None:
    # a file that HDF5 could not write cannot be closed either, so a full disk is seen before
    free = shutil.disk_usage(part.parent).free
    if free < 2 * block.values.nbytes + _MARGIN:
        raise OutputError(
            f"The disk of {part} is full ({free / 1e6:.1f} MB are left).", "Make room on the disk."
        )


def quantities_in(path: str | Path) -> tuple[str, ...]:
    """Quantities that a file written by `convert` holds."""
    with _opened(Path(path)) as file:
        return tuple(file)


def open_store(path: Path, quantity: str = "") -> Source:
    """Open one quantity of a file written by `convert`."""
    with _opened(path) as file:
        names = tuple(file)
        if quantity and quantity not in names:
            raise DataError(f"{path} holds {' and '.join(names)}, not {quantity}.", "Choose one of these.")
        if not quantity and len(names) != 1:
            raise DataError(
                f"{path} holds several quantities: {', '.join(names)}.",
                "Choose one with quantity= (--quantity).",
            )
        name = quantity or names[0]
        group = file[name]
        try:
            values, steps = group["values"], group["step"]
            symbols = tuple(s.decode() for s in group["symbol"][:])
            unit, interval = str(values.attrs["unit"]), float(group.attrs["interval_fs"])
            cell_unit = str(group["cell"].attrs["unit"]) if "cell" in group else ""
            digits = int(group.attrs["digits"])
        except KeyError as error:
            raise DataError(f"{path} is not complete ({error}).", "Convert the trajectory again.") from error
        if len(values) == 0:
            raise empty_file(path)
        if values.shape != (len(steps), values.shape[1], len(symbols), 3):
            raise DataError(
                f"The arrays in {path} do not fit together ({values.shape}, {len(steps)} steps, "
                f"{len(symbols)} atoms).",
                "Convert the trajectory again.",
            )
        n_frames, n_beads = values.shape[:2]
    frames = partial(_frames, path, name)
    return Source(
        path,
        symbols,
        name,
        unit,
        cell_unit,
        frames,
        True,
        [],
        n_beads=n_beads,
        n_frames=n_frames,
        interval=interval,
        digits=digits,
    )


def _frames(path: Path, name: str, n: int, atoms: Array | None) -> Iterator[Frames]:
    with _opened(path) as file:
        group = file[name]
        values, steps = group["values"], group["step"][:]
        cells = group["cell"][:] if "cell" in group else None
        for first in range(0, len(steps), n):
            last = min(first + n, len(steps))
            here = None
            if cells is not None:
                here = np.repeat(cells, last - first, axis=0) if len(cells) == 1 else cells[first:last]
            yield Frames(_slab(values, first, last, atoms), steps[first:last], here, last / len(steps))


def _slab(values: h5py.Dataset, first: int, last: int, atoms: Array | None) -> Array:
    if atoms is None:
        return values[first:last].astype(float)
    # h5py wants an increasing range; what it holds besides the chosen atoms is dropped
    low, high = int(atoms.min()), int(atoms.max()) + 1
    return values[first:last, :, low:high][:, :, atoms - low].astype(float)


def _opened(path: Path) -> h5py.File:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            f"{path} is not a readable HDF5 file ({str(error).splitlines()[0]}).",
            "Convert the trajectory again.",
        ) from error
    found = file.attrs.get("format", "nothing")
    if found != FORMAT:
        file.close()
        raise DataError(
            f"{path} says its format is {found!r}, not {FORMAT!r}.",
            "Give a file that `nnqmd spectrum convert` wrote with this version.",
        )
    return file
