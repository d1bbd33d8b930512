"""What is compared: phase I as its lattice constant changes, its phonons at Gamma, and one molecule.

Each function makes its structures, relaxes them with the potential that it is given, and returns labelled
frames; others read numbers off such frames. So the reference and the models go through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from ase import Atoms

from nnqmd_server.errors import DataError
from nnqmd_server.structures import Array
from nnqmd_server.units import AMU_A2_PER_FS2, EV_PER_INVCM, GPA, HBAR

Evaluate = Callable[[Atoms], Atoms]
"""Gives a structure its energy [eV], forces [eV/Angstrom] and stress [eV/Angstrom^3]."""
Build = Callable[[Array], Atoms]
"""A structure from its free coordinates [Angstrom]; positions are linear in them."""

LATTICE = (4.96, 5.02, 5.08, 5.14, 5.20)
"""Lattice constants of phase I [Angstrom]."""
PHONON_LATTICE = 5.08
BOX = 8.0
"""Of the molecule [Angstrom]."""
STEP = 0.03
"""Of the finite differences [Angstrom]. Larger than usual: forces of a plane-wave grid carry noise."""

_SIGNS = np.array([[1, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]])
_SHIFTS = np.array([[0, 0, 0], [1, 0, 1], [0, 1, 1], [1, 1, 0]]) / 2
_TURNS = ([0, 1, 2], [2, 0, 1], [1, 2, 0])  # the threefold axis: x,y,z  z,x,y  y,z,x
_FORCE_LEFT = 0.02
"""Largest force along a free coordinate that counts as none [eV/Angstrom]: the noise of the reference."""
_GUIDE_LEFT = 0.01
"""The same for the guide, which has no noise (a model is its own guide)."""


def phase1_crystal(lattice: float) -> Build:
    """Phase I (P2_1 3, 4 molecules) with free N (u, u, u) and H (x, y, z), all times the lattice constant."""

    def build(free: Array) -> Atoms:
        u, hydrogen = free[0] / lattice, free[1:] / lattice
        site = [np.full(3, u), *(hydrogen[turn] for turn in _TURNS)]
        fractions = [sign * at + shift for sign, shift in zip(_SIGNS, _SHIFTS, strict=True) for at in site]
        return Atoms("NHHH" * 4, np.array(fractions) * lattice, cell=[lattice] * 3, pbc=True)

    return build


def molecule_in_box(free: Array) -> Atoms:
    """NH3 with C3v symmetry: its H are (radius, height) away from N, in a box with no symmetric grid."""
    radius, height = free
    angles = 0.2 + np.arange(3) * 2 * np.pi / 3
    hydrogen = np.stack([radius * np.cos(angles), radius * np.sin(angles), np.full(3, height)], axis=1)
    positions = np.concatenate([np.zeros((1, 3)), hydrogen]) + np.array([4.01, 3.98, 4.03])
    return Atoms("NHHH", positions, cell=[BOX] * 3, pbc=True)


def relax(
    build: Build, free: Array, evaluate: Evaluate, guide: Evaluate, ahead: Array | float = 0.0, most: int = 30
) -> tuple[Atoms, Array]:
    """Quasi-Newton steps in the free coordinates: to the minimum of ``guide``, and on with its curvature.

    Parameters
    ----------
    build
        The structure.
    free
        Where to begin, shape (k,) [Angstrom].
    evaluate
        The potential.
    guide
        A cheap potential like it (or the same).
    ahead
        How far the minimum probably lies from that of the guide, as found for a similar structure [Angstrom].
    most
        Steps with each.

    Returns
    -------
    Atoms, Array
        The relaxed structure with its labels, and how far its minimum lies from that of the guide [Angstrom].

    Raises
    ------
    DataError
        Forces are still there after all steps.
    """
    for _ in range(most):
        gradient, left, _ = _slope(build, free, guide)
        curvature = curvature_of(build, free, guide)
        if left < _GUIDE_LEFT:
            break
        free = free - _step(curvature, gradient)
    start = free
    free = free + ahead
    been: list[tuple[Array, Array]] = []
    for _ in range(most):
        gradient, left, frame = _slope(build, free, evaluate)
        if left < _FORCE_LEFT:
            return frame, free - start
        been.append((free, gradient))
        # two steps with the guide's curvature; where it is not good enough, BFGS mends it
        free = free - _step(_mended(curvature, been) if len(been) > 2 else curvature, gradient)
    raise DataError(
        f"A force of {left:.3f} eV/Angstrom is left after {most} steps.",
        "Begin nearer to the minimum, or with the curvature of a better model.",
    )


def _mended(curvature: Array, been: Sequence[tuple[Array, Array]]) -> Array:
    """BFGS: the curvature after the gradients that were found on the way."""
    for (before, old), (after, new) in pairwise(been):
        move, change = after - before, new - old
        if move @ change > 1e-12:
            ahead = curvature @ move
            curvature = curvature + np.outer(change, change) / (change @ move)
            curvature = curvature - np.outer(ahead, ahead) / (move @ ahead)
    return curvature


def _slope(build: Build, free: Array, evaluate: Evaluate) -> tuple[Array, float, Atoms]:
    """Energy by free coordinate [eV/Angstrom], the largest force along one, and the labelled structure."""
    frame = evaluate(build(free))
    directions = _directions(build, free)
    gradient = -np.einsum("knx,nx->k", directions, frame.get_forces())
    return gradient, float(np.max(np.abs(gradient) / np.linalg.norm(directions, axis=(1, 2)))), frame


def _step(curvature: Array, gradient: Array) -> Array:
    """Newton's, always downhill and at most 0.05 Angstrom."""
    values, vectors = np.linalg.eigh(curvature)
    step = vectors @ ((vectors.T @ gradient) / np.maximum(np.abs(values), 1.0))
    return step * min(1.0, 0.05 / max(1e-9, float(np.abs(step).max())))


def curvature_of(build: Build, free: Array, evaluate: Evaluate, step: float = 0.01) -> Array:
    """Second derivatives of the energy in the free coordinates [eV/Angstrom^2], shape (k, k)."""
    directions = _directions(build, free)
    columns = []
    for move in np.eye(len(free)) * step:
        up, down = (evaluate(build(free + sign * move)).get_forces() for sign in (1, -1))
        columns.append(-np.einsum("knx,nx->k", directions, up - down) / (2 * step))
    matrix = np.array(columns)
    return (matrix + matrix.T) / 2


def _directions(build: Build, free: Array) -> Array:
    """How positions move with each free coordinate, shape (k, n, 3)."""
    here = build(free).positions
    return np.array([build(free + unit).positions - here for unit in np.eye(len(free))])


FREE_CRYSTAL = np.array([0.2107, 0.3689, 0.2671, 0.1159]) * 5.13
FREE_MOLECULE = np.array([0.94, 0.38])


def phase1(evaluate: Evaluate, guide: Evaluate, constants: Sequence[float] = LATTICE) -> list[Atoms]:
    """Phase I relaxed at every lattice constant; ``guide`` is a potential whose curvature is good enough."""
    frames, ahead = [], 0.0
    for lattice in sorted(constants, key=lambda a: abs(a - PHONON_LATTICE)):
        frame, ahead = _crystal(lattice, evaluate, guide, ahead)
        frame.info["config_type"] = "phase1"
        frames.append(frame)
    return sorted(frames, key=lambda frame: frame.cell[0, 0])


def _crystal(
    lattice: float, evaluate: Evaluate, guide: Evaluate, ahead: Array | float
) -> tuple[Atoms, Array]:
    return relax(phase1_crystal(lattice), FREE_CRYSTAL * lattice / 5.13, evaluate, guide, ahead)


def phonons(evaluate: Evaluate, guide: Evaluate) -> list[Atoms]:
    """The relaxed crystal, and N and one H of its first molecule moved to and fro along each axis."""
    return _displaced(evaluate, _crystal(PHONON_LATTICE, evaluate, guide, 0.0)[0], "phonons")


def molecule(evaluate: Evaluate, guide: Evaluate) -> list[Atoms]:
    """The relaxed molecule, and its N and one H moved to and fro along each axis."""
    return _displaced(evaluate, relaxed_molecule(evaluate, guide), "molecule")


def relaxed_molecule(evaluate: Evaluate, guide: Evaluate) -> Atoms:
    """The molecule at its minimum."""
    return relax(molecule_in_box, FREE_MOLECULE, evaluate, guide)[0]


def _displaced(evaluate: Evaluate, relaxed: Atoms, name: str) -> list[Atoms]:
    frames = [relaxed.copy()]
    frames[0].calc = relaxed.calc
    frames[0].info = {"config_type": name}
    for atom in (0, 1):  # symmetry makes the others of these
        for axis in range(3):
            for sign in (1, -1):
                moved = relaxed.copy()
                moved.positions[atom, axis] += sign * STEP
                frame = evaluate(moved)
                frame.info |= {"config_type": name, "moved": [atom, axis, sign]}
                frames.append(frame)
    return frames


@dataclass(frozen=True)
class Lattice:
    """What a curve of phase I says.

    Parameters
    ----------
    constants : Array
        Lattice constants [Angstrom], shape (n,).
    energy : Array
        Above the lowest of the points [meV/atom], shape (n,).
    pressure : Array
        [GPa], shape (n,).
    from_energy, from_pressure : float
        Lattice constant at the lowest energy (NaN of two points) and at zero pressure [Angstrom].
    bulk_modulus : float
        At zero pressure [GPa]; NaN of two points.
    bond, angle : Array
        N-H length [Angstrom] and H-N-H angle [degree], shape (n,).
    """

    constants: Array
    energy: Array
    pressure: Array
    from_energy: float
    from_pressure: float
    bulk_modulus: float
    bond: Array
    angle: Array


def lattice_of(frames: Sequence[Atoms]) -> Lattice:
    """Fits to energy and pressure against the lattice constant: cubic, or as far as the points allow."""
    degree = min(3, len(frames) - 1)
    a = np.array([frame.cell[0, 0] for frame in frames])
    energy = np.array([frame.get_potential_energy() / len(frame) for frame in frames]) * 1e3
    pressure = np.array([-np.trace(frame.get_stress(voigt=False)) / 3 for frame in frames]) / GPA
    middle = a.mean()
    in_energy = np.polynomial.Polynomial.fit(a - middle, energy, degree)
    in_pressure = np.polynomial.Polynomial.fit(a - middle, pressure, degree)
    lowest = _root(in_energy.deriv(), a - middle) + middle if degree > 1 else np.nan
    none = _root(in_pressure, a - middle) + middle
    bulk = -none / 3 * float(in_pressure.deriv()(none - middle)) if degree > 1 else np.nan
    return Lattice(
        a, energy - energy.min(), pressure, lowest, none, bulk,
        np.array([frame.get_distance(0, 1, mic=True) for frame in frames]),
        np.array([frame.get_angle(1, 0, 2, mic=True) for frame in frames]),
    )  # fmt: skip


def _root(polynomial: np.polynomial.Polynomial, inside: Array) -> float:
    roots = polynomial.roots()
    real = roots[np.abs(roots.imag) < 1e-9].real
    near = real[(real > inside.min() - 0.1) & (real < inside.max() + 0.1)]
    if len(near) == 0:
        raise DataError("The curve has no minimum near its points.", "Look at the energies and pressures.")
    return float(near[np.argmin(np.abs(near))])


def molecule_wavenumbers(frames: Sequence[Atoms]) -> Array:
    """Harmonic wavenumbers of a molecule [1/cm], shape (6,), rising; negative where they are imaginary.

    Translations and rotations are projected out.
    """
    relaxed = frames[0]
    arms = relaxed.positions - relaxed.positions[0]
    turns = np.arange(3) * 2 * np.pi / 3
    rotations = [np.array([[np.cos(t), -np.sin(t), 0], [np.sin(t), np.cos(t), 0], [0, 0, 1]]) for t in turns]
    images = [np.linalg.norm((arms @ r.T)[:, None] - arms[None], axis=2) for r in rotations]
    hessian = _hessian(frames, rotations, images)
    arms = relaxed.positions - relaxed.get_center_of_mass()
    rigid = [np.tile(unit, (4, 1)) for unit in np.eye(3)] + [np.cross(unit, arms) for unit in np.eye(3)]
    return _wavenumbers(hessian, relaxed, rigid)


def phonon_wavenumbers(frames: Sequence[Atoms]) -> Array:
    """Wavenumbers of phase I at Gamma [1/cm], shape (45,), rising; the acoustic ones are projected out.

    No splitting of longitudinal and transverse modes: that is a matter of the field at small wave vectors.
    """
    relaxed = frames[0]
    fractions = relaxed.get_scaled_positions()
    rotations, images = [], []
    for sign, shift in zip(_SIGNS, _SHIFTS, strict=True):
        for turn in _TURNS:
            rotation = sign[:, None] * np.eye(3)[turn]
            apart = (fractions @ rotation.T + shift)[:, None] - fractions[None]
            rotations.append(rotation)
            images.append(np.linalg.norm((apart - np.round(apart)) * relaxed.cell.lengths(), axis=2))
    hessian = _hessian(frames, rotations, images)
    return _wavenumbers(hessian, relaxed, [np.tile(unit, (len(relaxed), 1)) for unit in np.eye(3)])


def _hessian(frames: Sequence[Atoms], rotations: Sequence[Array], distances: Sequence[Array]) -> Array:
    """All second derivatives [eV/Angstrom^2], shape (3n, 3n), from those by the atoms that were moved.

    ``distances[k][i, j]``: from where operation k brings atom i to where atom j is [Angstrom].
    """
    columns = _columns(frames)
    n = len(frames[0])
    total, times = np.zeros((n, 3, n, 3)), np.zeros(n)
    for rotation, distance in zip(rotations, distances, strict=True):
        if distance.min(axis=1).max() > 0.01:
            raise DataError(
                "The relaxed structure has not the symmetry it should have.", "Relax it with symmetry."
            )
        image = distance.argmin(axis=1)
        for atom in (0, 1):
            block = np.stack([columns[atom, axis] for axis in range(3)], axis=2)  # (n, 3, 3): forces by moves
            total[image, :, image[atom], :] += rotation @ block @ rotation.T
            times[image[atom]] += 1
    return (total / times[None, None, :, None]).reshape(3 * n, 3 * n)


def _columns(frames: Sequence[Atoms]) -> dict[tuple[int, int], Array]:
    """Second derivatives of the energy by one coordinate [eV/Angstrom^2], shape (n, 3) each."""
    forces = {tuple(int(i) for i in frame.info["moved"]): frame.get_forces() for frame in frames[1:]}
    return {
        (atom, axis): (forces[atom, axis, -1] - forces[atom, axis, 1]) / (2 * STEP)
        for atom, axis, sign in forces
        if sign == 1
    }


def _wavenumbers(hessian: Array, atoms: Atoms, rigid: Sequence[Array]) -> Array:
    masses = np.repeat(atoms.get_masses(), 3)
    weighted = (hessian + hessian.T) / 2 / np.sqrt(np.outer(masses, masses))
    basis, _ = np.linalg.qr(
        np.stack([move.ravel() * np.sqrt(masses) for move in rigid], axis=1), mode="complete"
    )
    inner = basis[:, len(rigid) :]
    squares = np.linalg.eigvalsh(inner.T @ weighted @ inner) / AMU_A2_PER_FS2  # rad^2/fs^2
    return np.sign(squares) * np.sqrt(np.abs(squares)) * HBAR / EV_PER_INVCM
