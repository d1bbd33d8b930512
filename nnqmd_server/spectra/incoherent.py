"""Incoherent scattering straight from positions, without the Gaussian approximation.

    F_i(Q,t) = <exp(-iQ.r_i(0)) exp(iQ.r_i(t))>

For a ring polymer exp(iQ.r) is averaged over the beads before it is correlated. That is the ring-polymer
estimate of the Kubo-transformed function: exact at t = 0 as a Kubo function (its value there is below one),
good at short times and small Q. F(Q,t) of centroid positions instead has the Debye-Waller factor of the
centroid, which is that of classical mechanics.

The estimator is unbiased (each lag is divided by its number of time origins) and uses the Wiener-Khinchin
theorem: powers |FFT|^2 are added up over atoms and vectors of a shell, and one inverse transform per |Q|
ends the work. Phases are reduced to one turn in float64 and then kept in float32 (error of F: 1e-7).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import fft

from nnqmd_server.errors import DataError, InputError
from nnqmd_server.spectra import windows
from nnqmd_server.spectra.correlation import padded_size, spectral_density
from nnqmd_server.spectra.fourier_backends import Backend, backend_for
from nnqmd_server.spectra.pieces import Sliceable, pieces
from nnqmd_server.spectra.trajectory import Trajectory
from nnqmd_server.spectra.vectors import Family, QVectors
from nnqmd_server.units import HBAR, KB

Array = np.ndarray

BLOCK_BYTES = 1 << 21
"""Size of a block of vectors in the transform: it stays in a core's cache."""

TABLE_BYTES = 1 << 25
"""Largest tables of powers kept for all vectors of an atom."""

DIRECT = 24
"""Up to so many lags per spacing of origins, sums over the origins are cheaper than transforms."""

EXACT_EVERY = 16
"""Powers of a phase are multiplied up this far before they are computed anew."""


def scattering_function(
    positions: Sliceable | Trajectory,
    kinds: Array,
    vectors: QVectors,
    n_lags: int,
    every: int = 1,
    until: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> Array:
    """F(Q,t), averaged over the atoms of a kind, the vectors of a shell and time origins; its real part.

    Parameters
    ----------
    positions : Sliceable or Trajectory
        Unwrapped positions [Angstrom], shape (n_frames, n_atoms, 3), or (n_frames, n_beads, n_atoms, 3)
        for the bead average. Read in stretches of frames and blocks of atoms. A trajectory on disk is read
        once, as a stream.
    kinds : Array
        Which mean each atom belongs to: 0, 1, ..., or -1 for none; int, shape (n_atoms,).
    vectors : QVectors
        From `vectors.powder_vectors`, `lattice_vectors` or `free_vectors`.
    n_lags : int
        Number of lags, at most n_frames.
    every, until : int
        A correlation starts at every so manieth frame before frame ``until``. All frames by default, which
        is the fastest and the most precise; a choice serves the comparison with other programs.
    threads : int, optional
        Threads over atoms on a CPU; all cores by default.
    device : str
        ``cpu`` (NumPy and SciPy), or a device of torch such as ``cuda``: the same work there.
    progress : callable, optional
        Called with the fraction done.

    Returns
    -------
    Array
        Shape (n_kinds, n_shells, n_lags).
    """
    kinds = np.asarray(kinds)
    if every < 1 or (until is not None and until < 1) or n_lags < 1:
        raise InputError("There are no time origins.", "Give lags, every and until of 1 or more.")
    backend = backend_for(device)
    n_kinds = int(kinds.max()) + 1
    sums = np.zeros((n_kinds, len(vectors.Q), n_lags))
    counts = np.zeros(n_lags)
    for piece in pieces(positions, kinds, n_lags, every, until, progress):
        plan = _plan(piece.stop - piece.start, piece.end - piece.start, n_lags, every)
        for kind in range(n_kinds):
            total = _Total(len(vectors.Q), plan)
            for atoms in _blocks(np.flatnonzero(kinds == kind), piece.values_per_atom):
                block = piece.read(atoms)
                _check_finite(block, piece.start, atoms)
                _add_atoms(total, block, vectors, backend, threads)
            sums[kind] += total.lags(n_lags)
        # origins of lag l: every so manieth frame from the start, before stop and before end - l
        last = np.minimum(piece.stop, piece.end - np.arange(n_lags))
        counts += np.maximum(0, -(-(last - piece.start) // every))
    if not counts.all():
        raise InputError(
            f"{n_lags} lags do not fit the {int(counts[0] * every)} frames or so.", "Ask for fewer lags."
        )
    weights = vectors.counts * np.bincount(kinds[kinds >= 0], minlength=n_kinds)[:, None]
    return sums / weights[:, :, None] / counts


@dataclass(frozen=True)
class _Plan:
    """How a stretch of frames is correlated: |FFT|^2, a cross spectrum, or a direct sum over few origins."""

    how: str
    size: int
    columns: int
    every: int
    stop: int


def _plan(stop: int, n_frames: int, n_lags: int, every: int) -> _Plan:
    if n_lags <= DIRECT * every:
        reach = -(-n_lags // every)
        return _Plan("direct", (-(-stop // every) + reach) * every, reach * every, every, stop)
    size = every * fft.next_fast_len(-(-(n_frames + n_lags - 1) // every))
    return _Plan("power" if every == 1 and stop == n_frames else "cross", size, 2 * size, every, stop)


class _Total:
    """Contributions of many atoms, added up by several threads."""

    def __init__(self, n_shells: int, plan: _Plan) -> None:
        self.plan = plan
        self.sum = np.zeros((n_shells, plan.columns))
        self._lock = threading.Lock()

    def add(self, part: Array) -> None:
        with self._lock:
            self.sum += part

    def lags(self, n_lags: int) -> Array:
        """Real part of the correlation, summed over origins; shape (n_shells, n_lags)."""
        if self.plan.how == "direct":
            return self.sum[:, :n_lags]
        pairs = self.sum.reshape(len(self.sum), self.plan.size, 2)
        if self.plan.how == "cross":
            return fft.ifft(pairs[..., 0] + 1j * pairs[..., 1])[:, :n_lags].real
        return fft.rfft(pairs.sum(axis=-1))[:, :n_lags].real / self.plan.size


def _add_atoms(total: _Total, block: Array, vectors: QVectors, backend: Backend, threads: int | None) -> None:
    """Add atoms of a block of positions, shape (n, ..., n_atoms, 3), to the total."""
    beads = block.reshape(len(block), -1, *block.shape[-2:])  # (n, n_beads, n_atoms, 3)

    def one(atom: int) -> None:
        total.add(_atom(beads[:, :, atom], vectors, total.plan, backend))

    count = backend.threads(threads)
    if count == 1:
        for atom in range(beads.shape[2]):
            one(atom)
        return
    with ThreadPoolExecutor(count) as pool:
        for _ in pool.map(one, range(beads.shape[2])):
            pass


def _atom(beads: Array, vectors: QVectors, plan: _Plan, backend: Backend) -> Array:
    """What one atom adds, shape (n_shells, plan.columns)."""
    total = backend.zeros(len(vectors.Q), plan.columns)
    for family in vectors.families:
        turns = [_turns(beads[:, b], family.base, backend) for b in range(beads.shape[1])]
        every = slice(0, len(family.shell))
        spans = np.ptp(family.integers, axis=0).sum() + family.integers.shape[1]
        kept = len(turns) == 1 and spans * len(beads) * 8 <= TABLE_BYTES
        tables = _tables(turns[0], family, every, backend) if kept else None
        for rows in _row_blocks(family, plan.size, backend):
            e = _phases(tables or _tables(turns[0], family, rows, backend), family, rows, plan.size, backend)
            for other in turns[1:]:
                e += _phases(_tables(other, family, rows, backend), family, rows, plan.size, backend)
            if len(turns) > 1:
                e /= len(turns)
            shells = family.shell[rows]
            if plan.how == "direct":
                backend.add_lags(total, e, shells, plan.every, -(-plan.stop // plan.every))
            else:
                backend.add_power(total, e, shells, (plan.every, plan.stop) if plan.how == "cross" else None)
    return backend.to_numpy(total)


def _turns(positions: Array, base: Array, backend: Backend) -> list[Any]:
    """b.r in turns, reduced to [-1/2, 1/2] in float64; one array (n,) for each base vector."""
    turns = positions @ (base.T / (2 * np.pi))
    turns -= np.rint(turns)
    return [backend.turns(t) for t in turns.T]


def _tables(turns: list[Any], family: Family, rows: slice, backend: Backend) -> list[tuple[int, Any]]:
    """Lowest power and powers of exp(ib.r), for every base vector, as some vectors of the family need."""
    tables = []
    for axis, turn in enumerate(turns):
        wanted = family.integers[rows, axis]
        lowest = int(wanted.min())
        tables.append((lowest, backend.powers(turn, lowest, int(wanted.max()), EXACT_EVERY)))
    return tables


def _phases(tables: list[tuple[int, Any]], family: Family, rows: slice, size: int, backend: Backend) -> Any:
    """exp(iQ.r) of some vectors of a family, complex64, padded with zeros to shape (n_rows, size)."""
    factors = [(t, family.integers[rows, k] - lowest) for k, (lowest, t) in enumerate(tables)]
    return backend.product(factors, size)


def _row_blocks(family: Family, size: int, backend: Backend) -> list[slice]:
    most = max(4, 4 * (backend.block_bytes(BLOCK_BYTES) // (32 * size)))  # SIMD takes rows by four
    return [slice(k, min(k + most, len(family.shell))) for k in range(0, len(family.shell), most)]


def _blocks(atoms: Array, values_per_component: int) -> list[Array]:
    """Atoms in blocks of some 64 MB of positions."""
    most = max(1, (64 << 20) // (24 * values_per_component))
    return [atoms[k : k + most] for k in range(0, len(atoms), most)]


def _check_finite(block: Array, start: int, atoms: Array) -> None:
    good = np.isfinite(block).reshape(len(block), -1).all(axis=1)
    if not good.all():
        raise DataError(
            f"Frame {start + int(np.argmin(good))} holds positions that are not finite "
            f"(atoms {atoms[0]} to {atoms[-1]}).",
            "The run has failed there: leave the frames from there on out.",
        )


def structure_factor(
    F: Array, interval: float, temperature: float, window: Array | None = None, correction: str = "harmonic"
) -> tuple[Array, Array]:
    """S(Q,E) of a classical or Kubo-transformed F(Q,t).

        S(Q,E) = c(E) (1/2 pi hbar) Int dt w(t) F(Q,t) exp(-iEt/hbar),   E > 0: the neutron loses energy

    With the default ``harmonic`` correction c = x/(1 - exp(-x)), x = E/kT, which is exact for a Kubo
    function, S obeys detailed balance and its first moment is the recoil energy; its integral is one only as
    far as the motion is classical.

    Parameters
    ----------
    F : Array
        From `scattering_function`, shape (..., n_lags).
    interval : float
        Time between lags [fs].
    temperature : float
        [K].
    window : Array, optional
        Shape (n_lags,); a Hann window by default.
    correction : str
        ``harmonic``, or ``none`` for the classical function as it is.

    Returns
    -------
    energy : Array
        Even, both signs [eV], shape (n,).
    S : Array
        [1/eV], shape (..., n).
    """
    n_lags = F.shape[-1]
    size = padded_size(n_lags, interval)
    half = spectral_density(
        F * (windows.window("hann", n_lags) if window is None else window), interval, size
    ) / (np.pi * HBAR)
    energy = 2 * np.pi * HBAR / (size * interval) * np.arange(-(size // 2), size // 2 + 1)
    S = np.concatenate([half[..., :0:-1], half], axis=-1)
    if correction == "none":
        return energy, S
    if correction != "harmonic":
        raise InputError(f"There is no quantum correction {correction!r}.", "Use harmonic or none.")
    x = energy / (KB * temperature)
    return energy, S * np.divide(x, -np.expm1(-x), out=np.ones_like(x), where=x != 0)
