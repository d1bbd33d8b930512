"""A labelled frame: ASE's Atoms with the keys that ``nnqmd train`` reads.

Energy [eV], forces [eV/Angstrom] and stress [eV/Angstrom^3, ASE's sign] are the frame's calculator
results; ``wannier_centroid`` and ``wannier_centres`` [Angstrom, relative to the carrier atom] are arrays.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from nnqmd_server.errors import DataError, OutputError
from nnqmd_server.structures import Array

GROUP = "config_type"
"""Names the run of a frame; ``nnqmd train`` splits every run in time."""

SOURCE = "source_id"
"""Names a frame: its run and its number."""

CENTROID = "wannier_centroid"
CENTRES = "wannier_centres"

_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


def bad_frame(path: Path | str, frame: int, what: str, fix: str) -> DataError:
    """The error for one frame of a file, counted from 0."""
    return DataError(f"Frame {frame} (counted from 0) of {path} {what}.", fix)


def labelled(
    atoms: Atoms,
    energy: float,
    forces: Array,
    stress: Array | None,
    info: Mapping[str, Any],
    where: tuple[Path | str, int],
) -> Atoms:
    """A bare copy of a structure with labels.

    Parameters
    ----------
    atoms : Atoms
        Structure; only elements, positions, cell and periodicity are taken.
    energy : float
        [eV].
    forces : Array
        [eV/Angstrom], shape (n, 3).
    stress : Array or None
        [eV/Angstrom^3], positive under tension, shape (3, 3); None where there is none.
    info : mapping
        What else is to be written into the comment line.
    where : (path, frame)
        For messages.

    Raises
    ------
    DataError
        A number is not finite, a shape is wrong, or the stress is not symmetric.
    """
    path, frame = where
    forces = np.asarray(forces, dtype=float)
    if forces.shape != (len(atoms), 3):
        raise bad_frame(
            path,
            frame,
            f"has forces of shape {forces.shape} for {len(atoms)} atoms",
            "Use the file as the program wrote it; a run that was stopped leaves half a frame.",
        )
    parts = {"energy": np.asarray(energy, dtype=float), "forces": forces, "positions": atoms.positions}
    if stress is not None:
        stress = np.asarray(stress, dtype=float).reshape(3, 3)
        parts["stress"] = stress
    for name, values in parts.items():
        if not np.isfinite(values).all():
            raise bad_frame(
                path, frame, f"holds {name} that is NaN or infinite", "Compute this frame again or remove it."
            )
    results: dict[str, Any] = {"energy": float(energy), "forces": forces}
    if stress is not None:
        scale = max(1e-3, float(np.abs(stress).max()))
        if np.abs(stress - stress.T).max() > 0.05 * scale:
            raise bad_frame(
                path,
                frame,
                "has a stress that is not symmetric",
                "Check the order of its nine numbers; a stress without rotation must be symmetric.",
            )
        symmetric = (stress + stress.T) / 2
        results["stress"] = np.array([symmetric[i, j] for i, j in _VOIGT])
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.info.update(info)
    bare.calc = SinglePointCalculator(bare, **results)
    return bare


def has_stress(frame: Atoms) -> bool:
    """Whether the frame has a stress."""
    return frame.calc is not None and "stress" in frame.calc.results


def write_frames(path: Path, frames: Sequence[Atoms]) -> None:
    """Write extxyz so that the file is either the old one or the whole new one, whatever happens.

    Raises
    ------
    OutputError
        The folder or file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not ASE's collective write: under mpi4py it would wait for the other ranks
        write(part, list(frames), format="extxyz", parallel=False)
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}).", "Check the folder and the disk."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
