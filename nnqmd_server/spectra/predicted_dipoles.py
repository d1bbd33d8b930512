"""Dipoles of a trajectory by a model, after the run: of any program, or by a better dipole model."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from ase.data import atomic_numbers

from nnqmd_server.dipoles import is_head, molecular_dipoles
from nnqmd_server.errors import DataError, ModelError, OutputError
from nnqmd_server.potentials.base import Potential
from nnqmd_server.spectra.dipole_files import DIPOLE_FORMAT, DIPOLE_UNIT
from nnqmd_server.spectra.trajectory import Block, Progress, Trajectory
from nnqmd_server.structures import Array, Results, Structures, replicas

_CHUNK = 256


def write_dipoles(
    path: Path,
    trajectory: Trajectory,
    potential: Potential,
    batch: int = 64,
    skip: float = 0.0,
    born: bool = False,
    molecules: bool = False,
    progress: Progress | None = None,
) -> int:
    """Evaluate every frame and bead, and write a file that `nnqmd spectrum ir` reads.

    Datasets as in the ``dipoles.h5`` of a run: ``force_set`` (n,) the number of the frame, ``dipole``
    (n, n_beads, 3) [e Angstrom], ``energy`` (n, n_beads) [eV], ``cell`` (n, 3, 3) [Angstrom]; with ``born``,
    ``born_charges`` (n, n_beads, n_atoms, 3, 3) [e], dM_a/dR_ib at indices (i, a, b); with ``molecules``,
    ``molecular_dipole`` (n, n_beads, n_molecules, 3) [e Angstrom] about the atoms ``molecule_at``. The
    attribute ``interval_fs`` is the time between frames.

    Parameters
    ----------
    path
        The file; it appears when it is complete.
    trajectory
        Positions of all beads, or of one.
    potential
        Gives ``dipole`` and, for ``born``, ``born_charges``.
    batch
        Structures that are evaluated together.
    skip
        Time at the beginning to leave out [fs].
    born
        Write Born charges too.
    molecules
        Write the dipole of every molecule too.
    progress
        Called with the fraction done.

    Returns
    -------
    int
        Frames written.

    Raises
    ------
    DataError
        The trajectory is not one of positions in a cell, or cannot be read.
    ModelError
        The model gives no dipoles, or no Born charges.
    OutputError
        The file cannot be written.
    """
    needs = {"dipole": True, "born_charges": born, "wannier_centroid": molecules}
    for name in (name for name, wanted in needs.items() if wanted):
        if name not in potential.card.properties:
            fix = "Give a model with a Wannier read-out" + (", and ask for born." if born else ".")
            raise ModelError(f"The model {potential.card.name} does not give {name.replace('_', ' ')}.", fix)
    if trajectory.kind != "positions":
        raise DataError(
            f"{trajectory.path} holds {trajectory.quantity}, not positions.",
            "Give the positions of the atoms; i-PI writes those of a bead as positions.",
        )
    numbers = np.array([_number(symbol) for symbol in trajectory.symbols], dtype=np.int64)
    draft = path.with_name(f".{path.name}.part")
    try:
        with h5py.File(draft, "w") as file:
            written = _write(file, trajectory, numbers, potential, batch, skip, (born, molecules), progress)
        draft.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}.", "Choose another --out.") from error
    finally:
        draft.unlink(missing_ok=True)
    return written


def _write(
    file: h5py.File,
    trajectory: Trajectory,
    numbers: Array,
    potential: Potential,
    batch: int,
    skip: float,
    more: tuple[bool, bool],
    progress: Progress | None,
) -> int:
    born, molecules = more
    beads, n = trajectory.n_beads, len(numbers)
    file.attrs.update(
        {
            "format": DIPOLE_FORMAT,
            "model_sha256": potential.card.sha256,
            "n_beads": beads,
            "interval_fs": trajectory.interval,
            "trajectory": trajectory.path.name,
        }
    )
    units = {"force_set": "", "dipole": DIPOLE_UNIT, "energy": "eV", "cell": "Angstrom"}
    shapes: dict[str, tuple[int, ...]] = {
        "force_set": (),
        "dipole": (beads, 3),
        "energy": (beads,),
        "cell": (3, 3),
    }
    if born:
        units["born_charges"], shapes["born_charges"] = "e", (beads, n, 3, 3)
    if molecules:
        at = np.flatnonzero(is_head(numbers, potential.card.carriers or {}))
        units["molecular_dipole"], shapes["molecular_dipole"] = DIPOLE_UNIT, (beads, len(at), 3)
        file["molecule_at"] = at
    for name, shape in shapes.items():
        kind = np.int64 if name == "force_set" else np.float64
        chunk = 1 if name in ("born_charges", "molecular_dipole") else _CHUNK
        made = file.create_dataset(name, (0, *shape), kind, maxshape=(None, *shape), chunks=(chunk, *shape))
        made.attrs["unit"] = units[name]
    count = 0
    for block in trajectory.blocks(n_frames=max(1, batch // beads), skip=skip, progress=progress):
        for name, rows in _rows(block, numbers, potential, more, trajectory.path).items():
            file[name].resize(count + len(block.steps), axis=0)
            file[name][count:] = rows
        count += len(block.steps)
    return count


def _rows(
    block: Block, numbers: Array, potential: Potential, more: tuple[bool, bool], path: Path
) -> dict[str, Array]:
    if block.cells is None:
        raise DataError(
            f"{path} has no cell.",
            "Dipoles of molecules that cross the boundary need one; put it into the file.",
        )
    frames, beads, n, _ = block.values.shape
    structures = _structures(numbers, block)
    results = potential.evaluate(structures)
    dipole = results.properties["dipole"].reshape(frames, beads, 3)
    if not np.isfinite(dipole).all():
        raise DataError(
            f"The dipole of a frame near {block.first} of {path} is not finite.",
            "The run has failed there, or left what the model was trained for.",
        )
    rows = {
        "force_set": block.first + np.arange(frames),
        "dipole": dipole,
        "energy": results.energy.reshape(frames, beads),
        "cell": block.cells,
    }
    if more[1]:
        rows["molecular_dipole"] = _of_molecules(structures, results, potential).reshape(frames, beads, -1, 3)
    if more[0]:
        rows["born_charges"] = results.atom_properties["born_charges"].reshape(frames, beads, n, 3, 3)
    return rows


def _of_molecules(structures: Structures, results: Results, potential: Potential) -> Array:
    """Dipoles of all molecules of all structures [e Angstrom], one behind another."""
    centroids = results.atom_properties["wannier_centroid"]
    charges, carriers = potential.card.ion_charges or {}, potential.card.carriers or {}
    found = []
    for k in range(len(structures)):
        atoms = structures.atoms_of(k)
        where = structures.numbers[atoms], structures.positions[atoms], structures.cells[k]
        found.append(molecular_dipoles(*where, centroids[atoms], charges, carriers)[0])
    return np.concatenate(found)


def _structures(numbers: Array, block: Block) -> Structures:
    _, beads, n, _ = block.values.shape
    assert block.cells is not None
    return replicas(numbers, block.values.reshape(-1, n, 3), np.repeat(block.cells, beads, axis=0))


def _number(symbol: str) -> int:
    found = {"D": 1, "T": 1}.get(symbol) or atomic_numbers.get(symbol)
    if not found:
        raise DataError(f"{symbol!r} is not an element.", "Name the elements (for LAMMPS with --elements).")
    return found
