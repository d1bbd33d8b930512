"""The static dielectric constant from the fluctuations of the dipole of the cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import constants as c

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.correlation import autocorrelation
from nnqmd_server.spectra.currents import Current, current_of_dipoles
from nnqmd_server.spectra.dipole_files import Dipoles
from nnqmd_server.spectra.statistics import Blocks, jackknife

Array = np.ndarray

_TO_ONE = (c.e * 1e-10) ** 2 / 1e-30 / c.epsilon_0  # (e Angstrom)^2 / (Angstrom^3 J eps0)


@dataclass(frozen=True)
class DielectricConstant:
    """Static relative permittivity.

    Parameters
    ----------
    value : float
        eps_inf + (<M^2> - <M>^2) / (3 eps0 V kB T).
    error : float or None
        Standard error over blocks; None for a single block.
    high_frequency : float
        eps_inf that was put in: the dipoles of nuclei and electrons that follow them do not contain it.
    tensor : Array
        eps_ab by direction, shape (3, 3); its trace/3 is ``value``.
    mean_dipole : Array
        <M> [e Angstrom], shape (3,); zero by symmetry in a liquid that has been sampled well.
    relaxation : float
        Integral correlation time of M [fs]; the runs must be far longer.
    temperature, volume, duration : float
        [K], [Angstrom^3], of all runs [fs].
    n_blocks, n_runs : int
        Behind the error.
    warnings : tuple of str
        What makes the value doubtful.
    """

    value: float
    error: float | None
    high_frequency: float
    tensor: Array
    mean_dipole: Array
    relaxation: float
    temperature: float
    volume: float
    duration: float
    n_blocks: int
    n_runs: int
    warnings: tuple[str, ...] = ()


def dielectric_constant(
    runs: Dipoles | Sequence[Dipoles],
    temperature: float,
    high_frequency: float = 1.0,
    n_blocks: int = 10,
) -> DielectricConstant:
    """Static dielectric constant with conducting ("tin-foil") boundaries, as Ewald sums have them.

    eps = eps_inf + (<M^2> - <M>^2) / (3 eps0 V kB T), M the bead average (1/P) Sum_k M(r_k): its
    fluctuation is the Kubo-transformed static susceptibility, which is exact for path integrals, thermostat
    or not. Runs that began on different branches of the dipole are brought to the same.

    Parameters
    ----------
    runs : Dipoles or sequence of Dipoles
        One or several runs of one ensemble, neutral cell.
    temperature : float
        [K].
    high_frequency : float
        eps_inf.
    n_blocks : int
        Blocks of all runs together behind the error, at least one per run.

    Raises
    ------
    DataError
        No run; dipoles that jump.
    """
    several = [runs] if isinstance(runs, Dipoles) else list(runs)
    if not several:
        raise DataError("No dipoles were given.", "Name at least one run.")
    currents = [current_of_dipoles(r) for r in several]
    dipoles = _one_branch(currents, [r.cell[0] for r in several])
    volume = float(np.average([r.volume for r in currents], weights=[len(m) for m in dipoles]))
    scale = _TO_ONE / (volume * c.k * temperature)
    total = sum(map(len, dipoles))
    sums, counts = [], []
    for M in dipoles:
        pieces = max(1, round(n_blocks * len(M) / total))
        for piece in np.array_split(M, pieces):
            moments = np.concatenate([piece, (piece[:, :, None] * piece[:, None]).reshape(-1, 9)], axis=1)
            sums.append(moments.sum(axis=0))
            counts.append(np.full(12, len(piece)))
    blocks = Blocks(np.array(sums), np.array(counts))

    def tensor(moments: Array) -> Array:
        first, second = moments[:3], moments[3:].reshape(3, 3)
        return high_frequency * np.eye(3) + scale * (second - np.outer(first, first))

    found = jackknife(blocks, lambda moments: np.trace(tensor(moments)) / 3)
    relaxation = max(_relaxation(M, r.interval) for M, r in zip(dipoles, currents, strict=True))
    duration = sum(r.duration for r in currents)
    warnings = []
    if duration < 100 * relaxation:
        warnings.append(
            f"the dipole relaxes in {relaxation:.0f} fs, and the runs are {duration:.0f} fs long: at least a "
            "hundred relaxation times are needed for a static dielectric constant"
        )
    return DielectricConstant(
        float(found.value),
        None if found.error is None else float(found.error),
        high_frequency,
        tensor(blocks.mean),
        blocks.mean[:3],
        relaxation,
        temperature,
        volume,
        duration,
        len(blocks),
        len(several),
        tuple(warnings),
    )


def _one_branch(currents: Sequence[Current], cells: Sequence[Array]) -> list[Array]:
    dipoles = [r.dipole for r in currents if r.dipole is not None]
    home = dipoles[0].mean(axis=0)
    return [
        M - np.round((M.mean(axis=0) - home) @ np.linalg.inv(cell)) @ cell
        for M, cell in zip(dipoles, cells, strict=True)
    ]


def _relaxation(M: Array, interval: float) -> float:
    """Int_0 <dM(0).dM(t)>/<dM^2> dt [fs] up to where the function first falls below 0.05."""
    acf = autocorrelation(M - M.mean(axis=0), max(2, len(M) // 2))
    if not acf[0] > 0:
        return 0.0
    end = int(np.argmax(acf < 0.05 * acf[0])) or len(acf)
    return float(interval * max(0.5, acf[:end].sum() / acf[0] - 0.5))
