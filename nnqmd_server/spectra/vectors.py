"""Sets of momentum transfers, kept as integer combinations of few base vectors.

exp(i Q.r) of Q = n_1 b_1 + n_2 b_2 + n_3 b_3 is a product of powers of exp(i b.r): sines and cosines are then
needed for the base vectors only, and every further Q costs complex products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnqmd_server.errors import InputError

Array = np.ndarray


@dataclass(frozen=True)
class Family:
    """Vectors that share a base.

    Parameters
    ----------
    base : Array
        [1/Angstrom], shape (n_base, 3).
    integers : Array
        Vector k is ``integers[k] @ base``; shape (n, n_base).
    shell : Array
        Which |Q| each vector is counted for, int, shape (n,).
    """

    base: Array
    integers: Array
    shell: Array


@dataclass(frozen=True)
class QVectors:
    """Momentum transfers in shells; F(Q,t) is averaged over each shell.

    Parameters
    ----------
    Q : Array
        |Q| of each shell [1/Angstrom]; of a lattice the mean of its vectors; shape (n_shells,).
    families : tuple of Family
        The vectors.
    """

    Q: Array
    families: tuple[Family, ...]

    @property
    def vectors(self) -> Array:
        """All vectors, family by family [1/Angstrom], shape (n, 3)."""
        return np.concatenate([f.integers @ f.base for f in self.families])

    @property
    def shells(self) -> Array:
        """The shell of every one of `vectors`, shape (n,)."""
        return np.concatenate([f.shell for f in self.families])

    @property
    def counts(self) -> Array:
        """Number of vectors of each shell, shape (n_shells,)."""
        return np.bincount(self.shells, minlength=len(self.Q))


def directions(n: int) -> Array:
    """Points spread evenly over half a sphere (a Fibonacci spiral), unit vectors, shape (n, 3).

    F(-Q,t) is the complex conjugate of F(Q,t), so that half the sphere says all.
    """
    z = (np.arange(n) + 0.5) / n
    angle = np.pi * (1 + np.sqrt(5)) * np.arange(n)
    r = np.sqrt(1 - z**2)
    return np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1)


def powder_vectors(Q: Array, n_directions: int = 25) -> QVectors:
    """Every |Q| along the same directions, spread evenly over the sphere.

    The scattering of single atoms needs no vectors that fit the cell. Evenly spaced |Q| are computed fastest.

    Parameters
    ----------
    Q : Array
        [1/Angstrom], shape (n_shells,).
    n_directions : int
        Number of directions.
    """
    Q = np.atleast_1d(np.asarray(Q, dtype=float))
    if Q.ndim != 1 or not np.isfinite(Q).all() or (Q < 0).any() or n_directions < 1:
        raise InputError("Q values must be finite and not negative.", "Give |Q| in 1/Angstrom.")
    shell = np.arange(len(Q))
    step = np.diff(Q)
    if len(Q) > 1 and np.allclose(step, step[0], rtol=1e-9, atol=1e-12) and step[0] > 0:
        multiple = np.rint(Q / step[0])
        if np.allclose(multiple * step[0], Q, rtol=0, atol=1e-10):
            scales, integers = step[:1], multiple[:, None]
        else:
            scales, integers = np.array([Q[0], step[0]]), np.stack([np.ones_like(Q), shell], axis=1)
        integers = integers.astype(int)
        return QVectors(
            Q, tuple(Family(np.outer(scales, d), integers, shell) for d in directions(n_directions))
        )
    one = np.ones((1, 1), dtype=int)
    return QVectors(
        Q,
        tuple(
            Family(q * d[None], one, np.array([k])) for d in directions(n_directions) for k, q in enumerate(Q)
        ),
    )


def lattice_vectors(cell: Array, Q: Array, width: float, most: int = 25, seed: int = 0) -> QVectors:
    """Vectors of the reciprocal lattice of the cell, at most ``most`` in each shell.

    Parameters
    ----------
    cell : Array
        Cell vectors as rows [Angstrom], shape (3, 3).
    Q : Array
        Middles of the shells [1/Angstrom].
    width : float
        Full width of a shell [1/Angstrom].
    most : int
        Vectors kept in a shell, chosen at random.
    seed : int
        Of the choice.
    """
    base = 2 * np.pi * np.linalg.inv(np.asarray(cell, dtype=float)).T
    Q = np.atleast_1d(np.asarray(Q, dtype=float))
    reach = np.floor((Q.max() + width / 2) * np.linalg.norm(cell, axis=1) / (2 * np.pi)).astype(int)
    grid = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), -1).reshape(-1, 3)
    grid = grid[len(grid) // 2 + 1 :]  # one of each pair Q, -Q
    length = np.linalg.norm(grid @ base, axis=1)
    rng = np.random.default_rng(seed)
    chosen, shells = [], []
    for k, q in enumerate(Q):
        found = np.flatnonzero(np.abs(length - q) <= width / 2)
        if not len(found):
            raise InputError(
                f"The cell has no lattice vector between {q - width / 2:g} and {q + width / 2:g} 1/A.",
                "Widen the shells, or use directions that need not fit the cell (powder_vectors).",
            )
        if len(found) > most:
            found = np.sort(rng.choice(found, most, replace=False))
        chosen.append(found)
        shells.append(np.full(len(found), k))
    mean = np.array([length[c].mean() for c in chosen])
    return QVectors(mean, (Family(base, grid[np.concatenate(chosen)], np.concatenate(shells)),))


def free_vectors(vectors: Array) -> QVectors:
    """Any vectors [1/Angstrom], shape (n, 3), each a shell of its own."""
    vectors = np.atleast_2d(np.asarray(vectors, dtype=float))
    one = np.ones((1, 1), dtype=int)
    return QVectors(
        np.linalg.norm(vectors, axis=1),
        tuple(Family(v[None], one, np.array([k])) for k, v in enumerate(vectors)),
    )
