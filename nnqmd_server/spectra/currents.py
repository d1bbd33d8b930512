"""The electric current of the cell, J = dM/dt: from dipoles freed of branch jumps, or from charges.

The dipole of a periodic cell is known only up to whole numbers of e times cell vectors. When a Wannier
centre (two electrons) or an atom core (charge Z) is put back through the boundary, the dipole jumps by 2e
or Ze times a cell vector; such jumps are found and taken out. Born charges times velocities have no
branches at all, and are the only way for a cell that is charged or conducts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.dipole_files import Dipoles
from nnqmd_server.spectra.series import check_enough
from nnqmd_server.spectra.trajectory import Progress, Trajectory

Array = np.ndarray


@dataclass(frozen=True)
class Current:
    """Current of the cell at even times, averaged over the beads.

    Parameters
    ----------
    current : Array
        dM/dt [e Angstrom/fs], shape (n_frames, 3).
    dipole : Array or None
        Bead-averaged dipole on one branch [e Angstrom], shape (n, 3), where the current is its difference;
        None where the current comes from charges.
    volume : float
        Mean volume of the cell [Angstrom^3].
    interval : float
        Time between frames [fs].
    n_beads, n_jumps : int
        Beads averaged; branch jumps that were removed.
    """

    current: Array
    dipole: Array | None
    volume: float
    interval: float
    n_beads: int
    n_jumps: int = 0

    @property
    def duration(self) -> float:
        """Length of the run [fs]."""
        n = len(self.current) if self.dipole is None else len(self.dipole)
        return (n - 1) * self.interval

    @property
    def how(self) -> str:
        """Where it comes from, in words."""
        if self.dipole is None:
            return "charges times velocities"
        return f"difference of neighbouring dipoles / {self.interval:g} fs"


def current_of_dipoles(dipoles: Dipoles) -> Current:
    """Difference of neighbouring dipoles, divided by the interval.

    This is a central difference about the time half-way, and lowers a spectrum by
    [sin(w dt/2)/(w dt/2)]^2, which `infrared.infrared_spectrum` divides out.

    Raises
    ------
    DataError
        As `continuous`.
    """
    beads, n_jumps = continuous(dipoles.dipole, dipoles.cell)
    M = beads.mean(axis=1)
    volume = float(np.abs(np.linalg.det(dipoles.cell)).mean())
    J = np.diff(M, axis=0) / dipoles.interval
    return Current(J, M, volume, dipoles.interval, dipoles.dipole.shape[1], n_jumps)


def current_of_charges(
    velocities: Trajectory,
    charges: Array | Sequence[Trajectory],
    volume: float,
    skip: float = 0.0,
    progress: Progress | None = None,
) -> Current:
    """Current from charges times velocities, read as a stream.

    Parameters
    ----------
    velocities : Trajectory
        Centroid velocities for constant charges; for charges that change with time, the velocities of the
        same beads.
    charges : Array or three trajectories
        Fixed charges [e], shape (n_atoms,); fixed Born charges Z[i, a, b] = dM_a/dr_ib [e], shape
        (n_atoms, 3, 3); or i-PI's trajectories becx, becy, becz.
    volume : float
        Of the cell [Angstrom^3].
    skip : float
        Time at the beginning to leave out [fs].
    progress : callable, optional
        Called with the fraction read.

    Raises
    ------
    DataError
        Not velocities, another number of charges, trajectories that do not belong together.
    """
    if velocities.kind != "velocities":
        raise DataError(f"{velocities.path} holds {velocities.quantity}, not velocities.", "Give v_centroid.")
    if not volume > 0:
        raise DataError(f"A volume of {volume:g} A^3 makes no sense.", "Give the volume of the cell.")
    if isinstance(charges, Sequence):
        current = _with_changing_charges(velocities, charges, skip, progress)
    else:
        Z = np.asarray(charges, dtype=float)
        if Z.shape not in ((velocities.n_atoms,), (velocities.n_atoms, 3, 3)):
            raise DataError(
                f"{Z.shape} charges were given for {velocities.n_atoms} atoms.",
                "Give one charge for every atom, or one 3 x 3 matrix.",
            )
        rule = "tia,i->ta" if Z.ndim == 1 else "tib,iab->ta"
        parts = [np.einsum(rule, b.mean, Z) for b in velocities.blocks(skip=skip, progress=progress)]
        current = np.concatenate(parts)
    check_enough(velocities.path, len(current))
    return Current(current, None, volume, velocities.interval, velocities.n_beads)


def _with_changing_charges(
    velocities: Trajectory, charges: Sequence[Trajectory], skip: float, progress: Progress | None
) -> Array:
    names = ("becx", "becy", "becz")
    if tuple(c.quantity for c in charges) != names:
        raise DataError(
            f"Born charges need three trajectories, {', '.join(names)}, in this order, not "
            f"{', '.join(c.quantity for c in charges)}.",
            "Write all three with the stride of the velocities.",
        )
    for c in charges:
        same = (c.symbols, c.n_beads) == (velocities.symbols, velocities.n_beads)
        if not same or abs(c.interval / velocities.interval - 1) > 1e-9:
            raise DataError(
                f"{c.path} has other atoms, beads or another interval than {velocities.path}.",
                "Write Born charges and velocities of the same beads with the same stride.",
            )
    n = max(1, (1 << 24) // (24 * velocities.n_beads * velocities.n_atoms))
    streams = [velocities.blocks(n, skip, progress), *(c.blocks(n, skip) for c in charges)]
    parts, count = [], 0
    for blocks in zip(*streams, strict=False):
        v, *Z = blocks
        for block, c in zip(Z, charges, strict=True):
            if len(block.steps) != len(v.steps) or (block.steps != v.steps).any():
                raise DataError(
                    f"{c.path} and {velocities.path} are not at the same steps from frame {count} on.",
                    "Both must be of one run; cut them to the same length.",
                )
        count += len(v.steps)
        components = [np.einsum("tpia,tpia->t", v.values, block.values) / velocities.n_beads for block in Z]
        parts.append(np.stack(components, axis=1))
    return np.concatenate(parts)


def continuous(dipole: Array, cell: Array) -> tuple[Array, int]:
    """Remove jumps between branches of the dipole of a periodic cell, triclinic or not.

    Between two frames the true change is far smaller than half of e times a cell vector. In a cell that
    breathes, the part that was taken out goes with the cell.

    Parameters
    ----------
    dipole : Array
        Bead by bead [e Angstrom], shape (n_frames, n_beads, 3).
    cell : Array
        Cell vectors as rows [Angstrom], shape (n_frames, 3, 3).

    Returns
    -------
    Array
        Dipoles on one branch, same shape.
    int
        How many jumps were removed.

    Raises
    ------
    DataError
        A change that is neither small nor close to an integer number of e times cell vectors.
    """
    turns = np.einsum("tbi,tij->tbj", dipole, np.linalg.inv(cell))
    change = np.diff(turns, axis=0)
    whole = np.round(change)
    left = np.abs(change - whole)
    if left.max(initial=0.0) > 0.25:
        frame, bead, _ = np.unravel_index(np.argmax(left), left.shape)
        size = np.linalg.norm(dipole[frame + 1, bead] - dipole[frame, bead])
        raise DataError(
            f"The dipole of bead {bead} changes by {size:.3g} e Angstrom between frames {frame} and "
            f"{frame + 1}, which is no motion and no whole number of e times cell vectors.",
            "Write dipoles at every step, and check that the model belongs to this system; a conductor has "
            "no such dipole: use Born charges times velocities.",
        )
    result = dipole.copy()
    result[1:] -= np.einsum("tbj,tjk->tbk", np.cumsum(whole, axis=0), cell[1:])
    return result, int(np.count_nonzero(whole.any(axis=-1)))
