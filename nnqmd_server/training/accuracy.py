"""Errors of a potential on labelled frames, in the units that people quote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms

from nnqmd_server.dipoles import molecular_dipoles
from nnqmd_server.potentials.base import Potential
from nnqmd_server.structures import Array, from_ase
from nnqmd_server.training.data import WANNIER_CENTROID
from nnqmd_server.units import DEBYE, GPA


def errors_on(potential: Potential, frames: Sequence[Atoms], groups: Sequence[str]) -> dict[str, Any]:
    """Errors of a potential, beside the spread of the labels they must be compared with.

    Parameters
    ----------
    potential
        What is judged.
    frames
        Frames with energy [eV], forces [eV/Angstrom], stress [eV/Angstrom^3] and, if the potential gives
        them, Wannier centroids [Angstrom]; frames without these (or with NaN) are left out there.
    groups
        The run of every frame.

    Returns
    -------
    dict
        energy meV/atom, forces meV/Angstrom, stress GPa, wannier_centroid Angstrom, dipole debye. mae and
        rmse are over Cartesian components; of dipole and centroid, over lengths of error vectors.
        ``label_rms`` is the rms of the label itself (for the energy: its standard deviation).
    """
    structures = from_ase(frames)
    results = potential.evaluate(structures)
    atoms = np.diff(structures.offsets)
    energy = np.array([frame.get_potential_energy() for frame in frames])
    forces = np.concatenate([frame.get_forces() for frame in frames])
    stress = np.array([frame.get_stress(voigt=False) for frame in frames])
    predicted_stress = -results.virial / structures.volumes[:, None, None]
    symbols = np.concatenate([frame.get_chemical_symbols() for frame in frames])
    energy_error = (results.energy - energy) / atoms * 1e3
    force_error = (results.forces - forces) * 1e3
    found: dict[str, Any] = {
        "frames": len(frames),
        "atoms": int(structures.n_atoms),
        "energy_meV_per_atom": _summary(energy_error) | {"label_rms": float(np.std(energy / atoms * 1e3))},
        "forces_meV_per_A": _summary(force_error)
        | {"largest": float(np.abs(force_error).max()), "label_rms": _rms(forces * 1e3)},
        "forces_by_element_meV_per_A": {
            symbol: _summary(force_error[symbols == symbol])
            | {"label_rms": _rms(forces[symbols == symbol] * 1e3)}
            for symbol in potential.card.elements
            if (symbols == symbol).any()
        },
        "stress_GPa": _summary((predicted_stress - stress) / GPA) | {"label_rms": _rms(stress / GPA)},
    }
    if potential.card.carriers:
        centroids = results.atom_properties["wannier_centroid"]
        found |= _centroid_errors(potential, frames, symbols, centroids)
    run_of_atom = np.repeat(np.asarray(groups), atoms)
    found["by_run"] = {
        run: {
            "frames": int((np.asarray(groups) == run).sum()),
            "energy_meV_per_atom": _summary(energy_error[np.asarray(groups) == run]),
            "forces_meV_per_A": _summary(force_error[run_of_atom == run]),
        }
        for run in dict.fromkeys(groups)
    }
    return found


def _centroid_errors(
    potential: Potential, frames: Sequence[Atoms], symbols: Array, centroids: Array
) -> dict[str, Any]:
    carriers, charges = potential.card.carriers or {}, potential.card.ion_charges or {}
    carrier = np.isin(symbols, list(carriers))
    none = {len(frame): np.full((len(frame), 3), np.nan) for frame in frames}
    labels = np.concatenate([frame.arrays.get(WANNIER_CENTROID, none[len(frame)]) for frame in frames])
    labelled = carrier & np.isfinite(labels).all(axis=1)
    predicted, true, first = [], [], 0
    for frame in frames:
        part = slice(first, first + len(frame))
        first += len(frame)
        if not labelled[part].any():
            continue
        where = (frame.numbers, frame.positions, frame.cell.array)
        predicted.append(molecular_dipoles(*where, centroids[part], charges, carriers)[0])
        true.append(molecular_dipoles(*where, labels[part], charges, carriers)[0])
    if not true:
        return {}
    dipole_error = np.linalg.norm(np.concatenate(predicted) - np.concatenate(true), axis=1) / DEBYE
    dipole_length = np.linalg.norm(np.concatenate(true), axis=1) / DEBYE
    centroid_error = np.linalg.norm((centroids - labels)[labelled], axis=1)
    centroid_length = np.linalg.norm(labels[labelled], axis=1)
    return {
        "wannier_centroid_A": _summary(centroid_error) | {"label_rms": _rms(centroid_length)},
        "molecular_dipole_D": _summary(dipole_error) | {"label_rms": _rms(dipole_length)},
    }


def _summary(error: Array) -> dict[str, float]:
    return {"mae": float(np.abs(error).mean()), "rmse": _rms(error)}


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
