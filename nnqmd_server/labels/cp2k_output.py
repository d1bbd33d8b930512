"""What CP2K prints: energy, forces, stress and Wannier centres of one structure.

Units are read from the printed headings. CP2K's stress is pressure-like, (-1/V) dE/dstrain: ASE's stress
is its negative. Layouts of CP2K 2023 to 2026 and, for forces, of 6.1 to 2022.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.geometry import cellpar_to_cell

from nnqmd_server.errors import DataError
from nnqmd_server.labels.centres import same_atoms
from nnqmd_server.labels.frames import bad_frame, labelled
from nnqmd_server.structures import Array
from nnqmd_server.units import BOHR, GPA, HARTREE

_NUMBER = r"[-+]?\d+\.\d*(?:[EeDd][-+]?\d+)?"
_ENERGY = re.compile(
    rf"ENERGY\| Total FORCE_EVAL[^\[(]*(?:\([^)]*\) energy )?[\[(]([\w.]+)[\])]:?\s+({_NUMBER})"
)
_FORCES = re.compile(r"^\s*(?:FORCES\|\s*Atomic forces|ATOMIC FORCES in)\s*\[([\w./]+)\]", re.MULTILINE)
_OLD_ROW = re.compile(rf"\s*\d+\s+\d+\s+\S+\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s*")
_NEW_ROW = re.compile(rf"\s*FORCES\|\s*\d+\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\b.*")
_STRESS = re.compile(r"(?:STRESS\|\s*(?:Analytical|Numerical) stress tensor|STRESS TENSOR)\s*\[([\w/^]+)\]")
_STRESS_ROW = re.compile(rf"(?:\s*STRESS\|)?\s*[xyzXYZ]\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s*")
_COORDINATES = re.compile(r"ATOMIC COORDINATES IN (\w+)", re.IGNORECASE)
_ATOM_ROW = re.compile(rf"\s*\d+\s+\d+\s+\S+\s+(\d+)\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s+.*")
_CELL = re.compile(
    rf"CELL\| Vector [abc] \[(\w+)\]:?\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s+\|[abc]\| =\s+({_NUMBER})"
)
_ANGLE = re.compile(rf"CELL\| Angle \(\w,\w\), (?:alpha|beta|gamma)\s+\[degree\]:?\s+({_NUMBER})")
_PERIODICITY = re.compile(r"CELL\| Periodicity\s+(\w+)")
_VERSION = re.compile(r"CP2K\| version string:\s+(?:CP2K version )?(\S.*?)\s*$", re.MULTILINE)

_ENERGIES = {"a.u.": HARTREE, "hartree": HARTREE, "ev": 1.0}
_FORCE_UNITS = {"a.u.": HARTREE / BOHR, "hartree/bohr": HARTREE / BOHR, "ev/angstrom": 1.0}
_PRESSURES = {"gpa": GPA, "bar": 1e-4 * GPA, "kbar": 0.1 * GPA, "mpa": 1e-3 * GPA, "pa": 1e-9 * GPA}
_LENGTHS = {"angstrom": 1.0, "bohr": BOHR}


@dataclass(frozen=True)
class Output:
    """What was printed, in our units and signs.

    Parameters
    ----------
    version : str
        Of CP2K.
    energy : float
        [eV].
    forces : Array or None
        [eV/Angstrom], shape (n, 3).
    stress : Array or None
        [eV/Angstrom^3] in ASE's sign, shape (3, 3).
    """

    version: str
    energy: float
    forces: Array | None
    stress: Array | None


def read_output(path: Path, n_atoms: int | None = None) -> Output:
    """Labels of an output file of one structure.

    Parameters
    ----------
    path : Path
        What CP2K wrote with ``-o``.
    n_atoms : int, optional
        Atoms that must be there.

    Raises
    ------
    DataError
        The run did not end, its SCF did not converge, it holds several structures, or a unit is not known.
    """
    return _output(path, read_text(path), n_atoms)


def read_text(path: Path) -> str:
    """The text of an output file."""
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from error


def read_cp2k(path: Path, group: str) -> Atoms:
    """The labelled frame of an output file, with the structure as it is printed there.

    CP2K prints six decimals of the positions (Angstrom).

    Raises
    ------
    DataError
        As `read_output`; no positions or no forces were printed.
    """
    text = read_text(path)
    atoms = _structure(path, text)
    output = _output(path, text, len(atoms))
    if output.forces is None:
        raise bad_frame(
            path,
            0,
            "has no forces",
            "Use RUN_TYPE ENERGY_FORCE and FORCE_EVAL/PRINT/FORCES ON in CP2K's input.",
        )
    info = {"config_type": group, "source_id": f"{group}_{path.stem}", "label_code": f"CP2K {output.version}"}
    return labelled(atoms, output.energy, output.forces, output.stress, info, (path, 0))


def failure(text: str) -> str:
    """Why a run failed, in CP2K's own words, or "" if it does not say."""
    box = re.search(r"\[ABORT\](.*?)\n\s*\*{5,}", text, re.DOTALL)
    if box:
        words = [re.sub(r"[*\\/_|]{1,}|\bO\b", " ", line) for line in box[1].splitlines()]
        return " ".join(" ".join(words).split())[:300]
    if _unconverged(text):
        return "the SCF did not converge"
    return ""


def _unconverged(text: str) -> bool:
    return "SCF run NOT converged" in text or "outer SCF loop FAILED to converge" in text


def _output(path: Path, text: str, n_atoms: int | None) -> Output:
    again = "Compute this frame again, with more SCF steps or another mixing, or leave it out."
    version = _VERSION.search(text)
    if version is None:
        raise DataError(f"{path} is not an output of CP2K.", "Give the file that CP2K wrote (-o FILE).")
    if _unconverged(text):
        raise bad_frame(path, 0, "is not converged: CP2K says that the SCF did not converge", again)
    if "PROGRAM ENDED AT" not in text:
        why = failure(text)
        raise bad_frame(path, 0, "is not complete: CP2K did not end" + (f" ({why})" if why else ""), again)
    energies = _ENERGY.findall(text)
    if len(energies) != 1:
        raise DataError(
            f"{path} holds {len(energies)} energies; an output of one structure has one.",
            "For molecular dynamics use --format dpdata:cp2k/aimd_output on the folder of the run, "
            "or compute frames one by one (`nnqmd label`).",
        )
    unit, number = energies[0]
    energy = _number(number) * _unit(path, "energy", unit, _ENERGIES)
    forces = _forces(path, text)
    if forces is not None and n_atoms is not None and len(forces) != n_atoms:
        raise bad_frame(path, 0, f"has {len(forces)} forces for {n_atoms} atoms", again)
    return Output(version[1], energy, forces, _stress(path, text))


def _forces(path: Path, text: str) -> Array | None:
    heading = _FORCES.search(text)
    if heading is None:
        return None
    row = _NEW_ROW if "FORCES|" in heading[0] else _OLD_ROW
    rows: list[list[float]] = []
    for line in text[heading.end() :].splitlines()[1:]:
        found = row.fullmatch(line)
        if found:
            rows.append([_number(x) for x in found.groups()])
        elif rows:
            break
    return np.array(rows).reshape(-1, 3) * _unit(path, "forces", heading[1], _FORCE_UNITS)


def _stress(path: Path, text: str) -> Array | None:
    heading = _STRESS.search(text)
    if heading is None:
        return None
    rows = [_STRESS_ROW.fullmatch(line) for line in text[heading.end() :].splitlines()[1:8]]
    values = [[_number(x) for x in found.groups()] for found in rows if found][:3]
    if len(values) != 3:
        raise bad_frame(path, 0, "has a stress that cannot be read", "Use the file as CP2K wrote it.")
    return -np.array(values) * _unit(path, "stress", heading[1], _PRESSURES)


def _structure(path: Path, text: str) -> Atoms:
    cell = _cell(path, text)
    heading = _COORDINATES.search(text)
    if heading is None:
        raise bad_frame(
            path,
            0,
            "does not print the positions",
            "Use PRINT_LEVEL MEDIUM, or FORCE_EVAL/SUBSYS/PRINT/ATOMIC_COORDINATES.",
        )
    scale = _unit(path, "positions", heading[1], _LENGTHS)
    numbers, positions = [], []
    for line in text[heading.end() :].splitlines()[1:]:
        found = _ATOM_ROW.fullmatch(line)
        if found:
            numbers.append(int(found[1]))
            positions.append([_number(found[k]) * scale for k in (2, 3, 4)])
        elif numbers:
            break
    periodic = _PERIODICITY.search(text)
    axes = periodic[1].upper() if periodic else "XYZ"
    return Atoms(numbers, positions, cell=cell, pbc=[x in axes for x in "XYZ"])


def _cell(path: Path, text: str) -> Array:
    # CP2K prints the components with three decimals, lengths and angles with six
    rows = _CELL.findall(text)[:3]
    angles = [float(x) for x in _ANGLE.findall(text)[:3]]
    if len(rows) != 3:
        raise bad_frame(path, 0, "does not print the cell", "Use PRINT_LEVEL MEDIUM or LOW in CP2K's input.")
    scale = _unit(path, "cell", rows[0][0], _LENGTHS)
    printed = np.array([[_number(x) for x in row[1:4]] for row in rows])
    lengths = np.array([float(row[4]) for row in rows])
    if len(angles) != 3:
        return printed * (lengths / np.linalg.norm(printed, axis=1))[:, None] * scale
    exact = cellpar_to_cell([*lengths, *angles])
    if np.abs(exact - printed).max() > 6e-4:
        # turned away from a along x: the rotation that fits the printed components (Kabsch)
        left, _, right = np.linalg.svd(exact.T @ printed)
        exact = exact @ (left @ np.diag([1, 1, np.sign(np.linalg.det(left @ right))]) @ right)
    return exact * scale


def printed_centres(path: Path, atoms: Atoms) -> Array:
    """Centres of a file that ``WANNIER_CENTERS IONS+CENTERS`` wrote [Angstrom], shape (n, 3).

    Raises
    ------
    DataError
        The file is not one, or belongs to another structure.
    """
    try:
        lines = path.read_text().splitlines()
        count = int(lines[0])
        rows = [line.split() for line in lines[2 : 2 + count]]
        labels = [row[0] for row in rows]
        places = np.array([[float(x) for x in row[1:4]] for row in rows])
    except (OSError, ValueError, IndexError) as error:
        raise DataError(
            f"{path} is not a file of Wannier centres: {error}.",
            "Give what WANNIER_CENTERS with IONS+CENTERS writes (atoms, then X).",
        ) from error
    is_centre = np.array([label == "X" for label in labels])
    if len(lines) > 2 + count:
        raise DataError(
            f"{path} holds several structures.", "Give the centres of one structure, in a file of their own."
        )
    symbols = [label for label in labels if label != "X"]
    same_atoms(path, Atoms(symbols).numbers, places[~is_centre], atoms)
    if not is_centre.any():
        raise DataError(f"{path} holds no centres (X).", "Use IONS+CENTERS in WANNIER_CENTERS.")
    return places[is_centre]


def check_localisation(path: Path) -> None:
    """Refuse a localisation that did not converge, or one with two spins.

    Raises
    ------
    DataError
        With what CP2K says.
    """
    text = read_text(path)
    found = re.findall(r"Localization\s+for spin\s+(\d+)\s+(.*)", text)
    if any(spin != "1" for spin, _ in found):
        raise bad_frame(
            path, 0, "has orbitals of two spins", "Wannier centres are read from closed-shell calculations."
        )
    if not found or any(not words.startswith("converged") for _, words in found):
        raise bad_frame(
            path,
            0,
            "has orbitals whose localisation did not converge",
            "Raise LOCALIZE/MAX_ITER, or use another METHOD.",
        )


def _number(text: str) -> float:
    return float(text.replace("D", "E").replace("d", "e"))


def _unit(path: Path, what: str, unit: str, known: dict[str, float]) -> float:
    if unit.lower() not in known:
        raise DataError(
            f"{path} gives its {what} in {unit!r}, which is not known.", f"Known are {', '.join(known)}."
        )
    return known[unit.lower()]


def cubes_beside(folder: Path, pattern: str) -> Sequence[Path]:
    """Cube files in the order of their orbitals."""

    def number(path: Path) -> int:
        found = re.search(r"_w(\d+)_", path.name)
        return int(found[1]) if found else 0

    return sorted(folder.glob(pattern), key=number)
