"""Autocorrelation functions of a stream of frames, with the blocks that their errors come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import fft

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.correlation import PAIRS
from nnqmd_server.spectra.series import Velocities
from nnqmd_server.spectra.statistics import Blocks
from nnqmd_server.spectra.trajectory import Trajectory

Array = np.ndarray


@dataclass(frozen=True)
class Correlations:
    """Autocorrelation functions with the blocks behind them.

    Parameters
    ----------
    blocks : Blocks
        Per block and group: sum over pairs of frames k apart of a(t-k).a(t), averaged over the sites of the
        group; a pair of two blocks counts half in each. ``blocks.mean`` has shape (n_groups, n_lags) and is
        the estimate from all time origins.
    tensors : Array or None
        <a_i(0) a_j(t)> of every site in the order of `PAIRS`, symmetrised, shape (n_sites, 6, n_lags).
    groups : tuple of str
        Names, in the order of the blocks' first axis.
    n_frames, n_trajectories : int
        What was added.
    """

    blocks: Blocks
    tensors: Array | None
    groups: tuple[str, ...]
    n_frames: int
    n_trajectories: int


class RunningCorrelation:
    """Autocorrelation functions of vectors that come frame by frame; memory does not grow with the frames.

    The stream is cut into pieces of at least ``n_lags`` frames. The transform of a piece, padded with as
    many zeros, correlates it with itself and with the piece before, so every pair of times counts once:
    half in the block of either time. (Given to the later block alone, the part of the pairs that is odd in
    time would not cancel but come and go at the borders of blocks, and errors would come out too large.)
    Together the blocks are the unbiased estimate from all time origins. When there are twice
    ``most_blocks`` of them, neighbours are joined, so blocks grow with the run.

    Parameters
    ----------
    n_sites : int
        Vectors per frame, such as atoms.
    n_lags : int
        Lags 0 ... n_lags - 1.
    groups : mapping of str to indices, optional
        Sites to average over; one group of all sites, "all", by default.
    n_components : int
        Components of a vector.
    tensors : bool
        Whether to keep every site's tensor: 96 n_sites n_lags bytes; needs 3 components.
    most_blocks : int
        There are at most twice as many blocks while frames come in, and at most this many in the result.
    """

    def __init__(
        self,
        n_sites: int,
        n_lags: int,
        groups: Mapping[str, Sequence[int] | Array] | None = None,
        n_components: int = 3,
        tensors: bool = False,
        most_blocks: int = 16,
    ) -> None:
        self.n_lags = n_lags
        self.most_blocks = most_blocks
        self.groups = {"all": np.arange(n_sites)} if groups is None else groups
        self._length = fft.next_fast_len(2 * n_lags, real=True) // 2
        while fft.next_fast_len(2 * self._length, real=True) != 2 * self._length:
            self._length += 1
        self._piece = np.empty((self._length, n_sites, n_components))
        self._have = 0
        self._before = np.empty((n_sites, n_components, self._length + 1), dtype=complex)
        self._first = True
        self._alternate = 1.0 - 2.0 * (np.arange(self._length + 1) % 2)
        self._tensors = np.zeros((n_sites, 6, self._length + 1), dtype=complex) if tensors else None
        self._counts = np.zeros(n_lags)
        self._blocks: list[list[tuple[Array, Array]]] = []
        self._stride = 1  # pieces in a block
        self._pieces = 0  # of the block that is being filled
        self._n_frames = 0

    def add(self, frames: Array) -> None:
        """Frames that follow those before, shape (n, n_sites, n_components)."""
        if not self._blocks:
            self.next_trajectory()
        done = 0
        while done < len(frames):
            take = min(self._length - self._have, len(frames) - done)
            self._piece[self._have : self._have + take] = frames[done : done + take]
            self._have += take
            done += take
            if self._have == self._length:
                self._use_piece()
        self._n_frames += len(frames)

    def next_trajectory(self) -> None:
        """What is added from now on is another, independent run."""
        if self._have:
            self._use_piece()
        self._first = True
        self._pieces = 0
        if not self._blocks or self._blocks[-1]:
            self._blocks.append([])

    def result(self) -> Correlations:
        """Everything that was added; nothing may be added afterwards.

        Raises
        ------
        DataError
            Fewer frames than lags.
        """
        if self._have:
            self._use_piece()
        runs = [run for run in self._blocks if run]
        if not runs or (self._counts == 0).any():
            raise DataError(
                f"A correlation window of {self.n_lags} frames does not fit {self._n_frames} frames.",
                "Shorten the window (--lag), or run longer.",
            )
        while sum(map(len, runs)) > self.most_blocks and max(map(len, runs)) > 1:
            runs = [_joined(run) for run in runs]
        runs = [_without_stub(run) for run in runs]
        blocks = [block for run in runs for block in run]
        tensors = None
        if self._tensors is not None:
            sums = fft.irfft(self._tensors, 2 * self._length)[..., self._lags]
            tensors = sums / self._counts
        return Correlations(
            Blocks(np.array([b[0] for b in blocks]), np.array([b[1] for b in blocks])),
            tensors,
            tuple(self.groups),
            self._n_frames,
            len(runs),
        )

    @property
    def _lags(self) -> Array:
        # lag k stands at L - k of the product with [piece before, piece]
        return self._length - np.arange(self.n_lags)

    def _of_groups(self, products: Array) -> Array:
        means = np.array([products[sites].mean(axis=0) for sites in self.groups.values()])
        return fft.irfft(means, 2 * self._length)

    def _use_piece(self) -> None:
        n, first = self._have, self._first
        self._piece[n:] = 0.0
        n_sites = self._piece.shape[1]
        inside = np.empty((n_sites, self._length + 1))
        across = np.zeros((n_sites, self._length + 1), dtype=complex)
        for site in range(n_sites):  # one at a time stays in the processor's cache
            now = fft.rfft(np.ascontiguousarray(self._piece[:, site].T), 2 * self._length)
            before = self._before[site]
            inside[site] = (now.real**2 + now.imag**2).sum(axis=0)
            if not first:
                across[site] = (now.conj() * before).sum(axis=0)
            if self._tensors is not None:
                # transform of [piece before, piece]: a shift by half the length is a sign
                both = self._alternate * now if first else before + self._alternate * now
                conjugate = now.conj()
                self._tensors[site, :3] += conjugate * both
                for p, (a, b) in enumerate(PAIRS[3:], 3):
                    self._tensors[site, p] += 0.5 * (conjugate[a] * both[b] + conjugate[b] * both[a])
            self._before[site] = now
        lags = np.arange(self.n_lags)
        sums = self._of_groups(inside)[:, lags]
        counts = np.maximum(0.0, n - lags)
        if not first:
            shared, n_shared = 0.5 * self._of_groups(across)[:, self._lags], 0.5 * np.minimum(n, lags)
            self._blocks[-1][-1] = (self._blocks[-1][-1][0] + shared, self._blocks[-1][-1][1] + n_shared)
            sums, counts = sums + shared, counts + n_shared
        self._counts += np.maximum(0, n - lags) if first else n
        self._first, self._have = False, 0
        run = self._blocks[-1]
        if self._pieces == 0:
            run.append((sums, counts))
        else:
            run[-1] = (run[-1][0] + sums, run[-1][1] + counts)
        self._pieces = (self._pieces + 1) % self._stride
        if sum(map(len, self._blocks)) > 2 * self.most_blocks and max(map(len, self._blocks)) > 1:
            self._blocks = [_joined(r) for r in self._blocks]
            # the block being filled was the second of its pair, or stands alone and goes on
            self._pieces = (self._pieces + self._stride * (len(run) % 2 == 0)) % (2 * self._stride)
            self._stride *= 2


def _joined(run: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
    """Neighbouring blocks joined two by two; an odd last one stays."""
    pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(run[::2], run[1::2], strict=False)]
    return pairs + ([run[-1]] if len(run) % 2 else [])


def _without_stub(run: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
    """A last block of less than half the usual length joins the one before."""
    if len(run) > 1 and run[-1][1][0] < 0.5 * run[0][1][0]:
        return [*run[:-2], (run[-2][0] + run[-1][0], run[-2][1] + run[-1][1])]
    return run


def velocity_correlations(
    trajectories: Trajectory | Velocities | Sequence[Trajectory | Velocities],
    n_lags: int,
    groups: Mapping[str, Sequence[int] | Array] | None = None,
    skip: float = 0.0,
    tensors: bool = True,
    most_blocks: int = 16,
    progress: Callable[[float], None] | None = None,
) -> Correlations:
    """Velocity autocorrelation of independent runs of one ensemble, read as a stream.

    Parameters
    ----------
    trajectories : Trajectory, Velocities, or a sequence of them
        Centroid or classical velocities; beads are averaged.
    n_lags : int
        Number of lags.
    groups : mapping of str to atom indices, optional
        What to average over; one group per label by default.
    skip : float
        Time at the beginning of every run to leave out [fs].
    tensors : bool
        Whether to keep every atom's tensor.
    most_blocks : int
        Most blocks behind the errors.
    progress : callable, optional
        Called with the fraction done.

    Returns
    -------
    Correlations
        In Angstrom^2/fs^2.

    Raises
    ------
    DataError
        Not velocities, runs of different atoms or intervals, fewer frames than lags.
    """
    several = [trajectories] if isinstance(trajectories, Trajectory | Velocities) else list(trajectories)
    check_one_ensemble(several)
    first = several[0]
    if groups is None:
        labels = np.array(first.symbols)
        groups = {s: np.flatnonzero(labels == s) for s in dict.fromkeys(first.symbols)}
    running = RunningCorrelation(len(first.symbols), n_lags, groups, tensors=tensors, most_blocks=most_blocks)
    for k, run in enumerate(several):
        running.next_trajectory()
        if isinstance(run, Velocities):
            running.add(run.after(skip).velocities if skip else run.velocities)
            continue

        def tell(done: float, k: int = k) -> None:
            if progress is not None:
                progress((k + done) / len(several))

        for block in run.blocks(skip=skip, progress=tell):
            running.add(block.mean)
    return running.result()


def check_one_ensemble(several: Sequence[Trajectory | Velocities]) -> None:
    """Refuse runs that cannot be averaged."""
    if not several:
        raise DataError("No trajectory was given.", "Name at least one.")
    for run in several:
        if isinstance(run, Trajectory) and run.kind != "velocities":
            raise DataError(
                f"{run.path} holds {run.quantity}, not velocities.",
                "Add <trajectory filename='vc' stride='2'> v_centroid </trajectory> to the i-PI input.",
            )
        if run.symbols != several[0].symbols or abs(run.interval / several[0].interval - 1) > 1e-9:
            name = run.path if isinstance(run, Trajectory) else "One run"
            raise DataError(
                f"{name} has other atoms or another interval than the first run.",
                "Average only runs of one ensemble, written with the same stride.",
            )
