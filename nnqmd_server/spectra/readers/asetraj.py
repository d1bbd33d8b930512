"""ASE's binary trajectories (``.traj``): by definition positions in Angstrom and momenta in ASE's units."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.readers.source import Array, Frames, Source, empty_file, other_contents


def open_ase(path: Path, quantity: str = "") -> Source:
    """Open a ``.traj`` file; velocities when it has momenta, unless ``quantity`` says positions."""
    from ase.io.trajectory import Trajectory as AseTrajectory

    if path.stat().st_size == 0:
        raise empty_file(path)
    try:
        with AseTrajectory(str(path)) as file:
            n_frames = len(file)
            first = file[0]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AssertionError) as error:
        raise DataError(
            f"{path} cannot be read as an ASE trajectory ({error}).",
            "If the program was killed while writing, cut it with ASE, or run again.",
        ) from error
    quantity = quantity or ("velocities" if first.has("momenta") else "positions")
    if quantity not in ("positions", "velocities"):
        raise DataError(f"{path} has no {quantity!r}.", "Ask for 'positions' or 'velocities' (--quantity).")
    if quantity == "velocities" and not first.has("momenta"):
        raise DataError(f"{path} holds no momenta.", "Write the trajectory from ASE's molecular dynamics.")
    symbols = tuple(first.get_chemical_symbols())
    unit = "ase" if quantity == "velocities" else "angstrom"
    frames = partial(_frames, path, symbols, quantity)
    return Source(path, symbols, quantity, unit, "angstrom", frames, False, [], n_frames=n_frames)


def _frames(
    path: Path, symbols: tuple[str, ...], quantity: str, n: int, atoms: Array | None
) -> Iterator[Frames]:
    from ase.io.trajectory import Trajectory as AseTrajectory

    with AseTrajectory(str(path)) as file:
        total = len(file)
        for start in range(0, total, n):
            images = []
            for k in range(start, min(start + n, total)):
                try:
                    images.append(file[k])
                except (OSError, ValueError, KeyError, IndexError, TypeError, AssertionError) as error:
                    raise DataError(
                        f"Frame {k} of {path} cannot be read ({error}).",
                        "The program was killed while writing it: cut the file before this frame with ASE.",
                    ) from error
                if tuple(images[-1].get_chemical_symbols()) != symbols:
                    raise other_contents(
                        path, k, f"{len(images[-1])} atoms", f"{len(symbols)} atoms, by label"
                    )
            values = np.array(
                [i.get_velocities() if quantity == "velocities" else i.positions for i in images]
            )
            yield Frames(
                (values if atoms is None else values[:, atoms])[:, None],
                np.arange(start, start + len(images), dtype=np.int64),
                np.array([i.cell.array for i in images]),
                (start + len(images)) / total,
            )
