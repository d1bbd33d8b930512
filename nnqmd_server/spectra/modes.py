"""Phonon modes of other programs as a source of densities of states, for the same S(Q,E) code as runs.

A mode of energy E and eigenvector e (mass-weighted, orthonormal) gives atom i the density of states tensor
f_i^ab(E') = Re(e_ia e_ib*) delta(E' - E), averaged over the q-points with their weights. On the grid a mode
is shared by its two neighbours so that its energy is kept.

Files: phonopy's mesh.yaml, qpoints.yaml and band.yaml written with eigenvectors (frequencies in THz),
mesh.hdf5 beside a phonopy yaml that names the atoms, and Euphonic's JSON of QpointPhononModes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import constants, sparse

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.vibrations import Element, Vibrations
from nnqmd_server.units import AMU_IN_ELECTRON_MASSES, EV_PER_INVCM, HARTREE

Array = np.ndarray

THZ = constants.h * 1e12 / constants.e
"""1 THz in eV."""

_ENERGY_UNITS = {
    "millielectron_volt": 1e-3,
    "meV": 1e-3,
    "electron_volt": 1.0,
    "1 / centimeter": EV_PER_INVCM,
    "1/cm": EV_PER_INVCM,
    "terahertz": THZ,
    "THz": THZ,
    "hartree": HARTREE,
}
_MASS_UNITS = {
    "unified_atomic_mass_unit": 1.0,
    "amu": 1.0,
    "dalton": 1.0,
    "electron_mass": 1 / AMU_IN_ELECTRON_MASSES,
}


@dataclass(frozen=True)
class Modes:
    """Phonon modes at some q-points.

    Parameters
    ----------
    symbols : tuple of str
        Labels of the atoms of the cell.
    masses : Array
        [amu], shape (n_atoms,).
    energies : Array
        [eV], imaginary ones negative, shape (n_q, n_modes).
    eigenvectors : Array
        Mass-weighted and orthonormal, complex, shape (n_q, n_modes, n_atoms, 3); read by slices of q.
    weights : Array
        Of the q-points, sum one, shape (n_q,).
    source : str
        The file.
    warnings : tuple of str
        What was doubtful.
    """

    symbols: tuple[str, ...]
    masses: Array
    energies: Array
    eigenvectors: Any
    weights: Array
    source: str
    warnings: tuple[str, ...] = ()


def read_modes(path: str | Path, cell: str | Path | None = None) -> Modes:
    """Phonon modes from a file of phonopy or Euphonic.

    Parameters
    ----------
    path : path
        ``mesh.yaml``, ``qpoints.yaml``, ``band.yaml`` or ``mesh.hdf5`` of phonopy, or Euphonic's ``*.json``.
    cell : path, optional
        For mesh.hdf5: a phonopy yaml with the primitive cell; ``phonopy.yaml`` beside it by default.

    Raises
    ------
    DataError
        Not such a file, or without eigenvectors.
    """
    path = Path(path)
    try:
        if path.suffix in (".hdf5", ".h5"):
            modes = _from_hdf5(path, Path(cell) if cell else path.with_name("phonopy.yaml"))
        elif path.suffix == ".json":
            modes = _from_euphonic(json.loads(path.read_text(encoding="utf-8")), path)
        else:
            modes = _from_phonopy(_yaml(path), path)
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"{path} holds no phonon modes that can be read ({type(error).__name__}: {error}).",
            "Give phonopy's mesh.yaml (or qpoints.yaml, band.yaml, mesh.hdf5) written with eigenvectors, or "
            "Euphonic's QpointPhononModes as JSON.",
        ) from error
    return _checked(modes, path)


def vibrations_of_modes(
    modes: Modes, temperature: float, step: float = 0.5, smallest: float = 2.0
) -> Vibrations:
    """Densities of states of phonon modes.

    Parameters
    ----------
    modes : Modes
        From `read_modes`.
    temperature : float
        Of the spectrum to come [K].
    step : float
        Spacing of the energies [cm^-1].
    smallest : float
        Modes below this energy, such as the translations at q = 0 and imaginary ones, are left out [cm^-1].
    """
    width = step * EV_PER_INVCM
    n = int(np.ceil(max(modes.energies.max() / width, 100) * 1.02)) + 2
    n_atoms = len(modes.symbols)
    tensors = np.zeros((n, n_atoms * 6))
    for part in _q_blocks(modes):
        e = np.asarray(modes.eigenvectors[part])
        keep = modes.energies[part] > smallest * EV_PER_INVCM
        weight = np.broadcast_to(modes.weights[part, None], keep.shape)[keep]
        place = modes.energies[part][keep] / width
        low = np.floor(place).astype(int)
        vectors = e[keep]  # (n_kept, n_atoms, 3)
        products = np.stack(
            [
                (vectors[..., a] * vectors[..., b].conj()).real
                for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
            ],
            axis=-1,
        )
        rows = np.concatenate([low, low + 1])
        share = np.concatenate([(1 - (place - low)) * weight, (place - low) * weight])
        spread = sparse.csr_matrix((share, (rows, np.tile(np.arange(len(low)), 2))), shape=(n, len(low)))
        tensors += spread @ products.reshape(len(low), -1)
    tensors = tensors.T.reshape(n_atoms, 6, n) / width
    energies = width * np.arange(n)
    elements = []
    for symbol, mass in dict.fromkeys(zip(modes.symbols, modes.masses.round(6), strict=True)):
        atoms = np.flatnonzero((np.array(modes.symbols) == symbol) & (modes.masses.round(6) == mass))
        mine = tensors[atoms]
        density = mine[:, :3].mean(axis=(0, 1))
        norm = float(density.sum() * width)
        elements.append(
            Element(
                symbol, len(atoms), float(mass), density / norm, None, mine / norm, 1.0, 0.0, 0.0, "", atoms
            )
        )
    return Vibrations(
        energies, tuple(elements), temperature, 0.0, 0.0, 0.0, 0, 0, 2 * (n - 1), modes=modes.source
    )


def _q_blocks(modes: Modes) -> Iterator[slice]:
    """q-points in blocks of some 64 MB of eigenvectors."""
    n_q, n_modes = modes.energies.shape
    most = max(1, (64 << 20) // (16 * n_modes**2))
    for first in range(0, n_q, most):
        yield slice(first, min(first + most, n_q))


def _checked(modes: Modes, path: Path) -> Modes:
    n_q, n_modes = modes.energies.shape
    if modes.eigenvectors.shape != (n_q, n_modes, len(modes.symbols), 3) or n_modes != 3 * len(modes.symbols):
        raise DataError(
            f"The eigenvectors in {path} have the shape {modes.eigenvectors.shape}; {n_q} q-points of "
            f"{len(modes.symbols)} atoms need ({n_q}, {3 * len(modes.symbols)}, {len(modes.symbols)}, 3).",
            "Write all modes of the primitive cell.",
        )
    norm = np.linalg.norm(np.asarray(modes.eigenvectors[:1]).reshape(n_modes, -1), axis=1)
    if not np.isfinite(modes.energies).all() or np.abs(norm - 1).max() > 1e-3:
        raise DataError(
            f"The modes in {path} are not finite, or their eigenvectors are not normalised.",
            "Give eigenvectors of the dynamical matrix, not displacements.",
        )
    warnings = list(modes.warnings)
    imaginary = (
        modes.weights @ (modes.energies < -2 * EV_PER_INVCM).sum(axis=1) / n_modes / modes.weights.sum()
    )
    if imaginary > 0:
        warnings.append(f"{100 * imaginary:.2g} % of the modes are imaginary and were left out")
    return Modes(
        modes.symbols,
        np.asarray(modes.masses, dtype=float),
        modes.energies,
        modes.eigenvectors,
        modes.weights / modes.weights.sum(),
        modes.source,
        tuple(warnings),
    )


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with path.open(encoding="utf-8") as file:
            data = yaml.load(file, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not yaml: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise TypeError("not a file of phonopy")
    return data


def _atoms(data: dict[str, Any]) -> tuple[tuple[str, ...], Array]:
    points = data.get("points") or data["primitive_cell"]["points"]
    return tuple(p["symbol"] for p in points), np.array([float(p["mass"]) for p in points])


def _from_phonopy(data: dict[str, Any], path: Path) -> Modes:
    symbols, masses = _atoms(data)
    phonon = data["phonon"]
    if "eigenvector" not in phonon[0]["band"][0]:
        raise DataError(f"{path} has no eigenvectors.", "Run phonopy with EIGENVECTORS = .TRUE.")
    energies = THZ * np.array([[b["frequency"] for b in q["band"]] for q in phonon])
    parts = np.array([[b["eigenvector"] for b in q["band"]] for q in phonon], dtype=float)
    weights = np.array([float(q.get("weight", 1)) for q in phonon])
    warnings = ()
    if "weight" not in phonon[0] and len(phonon) > 1:
        warnings = ("the q-points have no weights (a path, not a mesh): all count the same",)
    return Modes(symbols, masses, energies, parts[..., 0] + 1j * parts[..., 1], weights, path.name, warnings)


def _from_hdf5(path: Path, cell: Path) -> Modes:
    import h5py

    symbols, masses = _atoms(_yaml(cell))
    with h5py.File(path, "r") as file:
        if "eigenvector" not in file:
            raise DataError(f"{path} has no eigenvectors.", "Run phonopy with EIGENVECTORS = .TRUE.")
        energies = THZ * np.asarray(file["frequency"])
        weights = np.asarray(file["weight"], dtype=float)
    # phonopy's matrix has a column for each mode
    return Modes(symbols, masses, energies, _Columns(path, len(symbols)), weights, path.name)


class _Columns:
    """Eigenvectors of mesh.hdf5, read by slices of q."""

    def __init__(self, path: Path, n_atoms: int) -> None:
        import h5py

        self._path = path
        with h5py.File(path, "r") as file:
            n_q, _, n_modes = file["eigenvector"].shape
        self.shape = (n_q, n_modes, n_atoms, 3)

    def __getitem__(self, part: slice) -> Array:
        import h5py

        with h5py.File(self._path, "r") as file:
            block = np.asarray(file["eigenvector"][part])
        return block.transpose(0, 2, 1).reshape(-1, *self.shape[1:])


def _from_euphonic(data: dict[str, Any], path: Path) -> Modes:
    if (
        data.get("__euphonic_class__", "QpointPhononModes") != "QpointPhononModes"
        or "eigenvectors" not in data
    ):
        raise DataError(
            f"{path} is Euphonic's {data.get('__euphonic_class__')}, not QpointPhononModes.",
            "Save the modes themselves: calculate_qpoint_phonon_modes(...).to_json_file(...).",
        )
    crystal = data["crystal"]
    parts = np.array(data["eigenvectors"], dtype=float)
    weights = data.get("weights")
    return Modes(
        tuple(crystal["atom_type"]),
        np.array(crystal["atom_mass"]) * _known(crystal["atom_mass_unit"], _MASS_UNITS),
        np.array(data["frequencies"]) * _known(data["frequencies_unit"], _ENERGY_UNITS),
        parts[..., 0] + 1j * parts[..., 1],
        np.ones(len(parts)) if weights is None else np.array(weights, dtype=float),
        path.name,
    )


def _known(unit: str, units: dict[str, float]) -> float:
    if unit not in units:
        raise ValueError(f"the unit {unit!r} is not known")
    return units[unit]
