"""Vibrational densities of states from velocity autocorrelation tensors.

    f(w) = (2 M / (3 pi kB T)) Int_0^inf <v(0).v(t)> cos(wt) dt,   Int_0^inf f dw = 1

<v.v> is the classical or the Kubo-transformed function: centroid velocities in (T)RPMD and CMD give
the latter. Energies E = hbar w are the axis here: a density is per eV, and its integral by the
trapezoid rule (half weight at E = 0) is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.correlation import (
    block_slices,
    hann,
    hann_width,
    mean_square_displacement,
    padded_size,
    spectral_density,
    standard_error,
    velocity_tensors,
)
from nnqmd_server.spectra.trajectory import Velocities, masses_of
from nnqmd_server.units import AMU_A2_PER_FS2, HBAR, KB

Array = np.ndarray


@dataclass(frozen=True)
class Element:
    """All atoms of one label.

    Parameters
    ----------
    symbol : str
        i-PI's label.
    count : int
        Number of these atoms in the cell.
    mass : float
        [amu].
    density : Array
        Density of states averaged over these atoms [1/eV], shape (n_energies,).
    error : Array or None
        Its standard error over blocks of the run, or None where the run is one block.
    tensors : Array
        Per atom, components in the order of `correlation.PAIRS`, on the scale of ``density``
        (mean over atoms of trace/3 = density before clipping) as correlation functions in time:
        shape (count, 6, n_lags).
    kinetic_ratio : float
        M <v^2> / 3 kB T before normalising: effective over nominal temperature.
    clipped : float
        Weight of negative values that were set to zero before normalising.
    diffusion : float
        Diffusion coefficient from the zero-frequency value [Angstrom^2/fs].
    """

    symbol: str
    count: int
    mass: float
    density: Array
    error: Array | None
    tensors: Array
    kinetic_ratio: float
    clipped: float
    diffusion: float


@dataclass(frozen=True)
class Vibrations:
    """Densities of states of a run, on one energy grid.

    Parameters
    ----------
    energies : Array
        k * step [eV], k = 0 ..., shape (n_energies,).
    elements : tuple of Element
        In the order of first appearance.
    temperature : float
        [K].
    interval, lag, duration : float
        Time between frames, length of the Hann window, length of the run [fs].
    n_frames, n_blocks : int
        Frames used; independent blocks behind the standard errors.
    size : int
        Length of the zero-padded transform; step = 2 pi hbar / (size * interval).
    """

    energies: Array
    elements: tuple[Element, ...]
    temperature: float
    interval: float
    lag: float
    duration: float
    n_frames: int
    n_blocks: int
    size: int

    @property
    def step(self) -> float:
        """Spacing of the energy grid [eV]."""
        return float(self.energies[1])

    @property
    def resolution(self) -> float:
        """Full width at half maximum of a sharp line [eV]."""
        return 2 * np.pi * HBAR * hann_width(self.lag)

    @property
    def highest(self) -> float:
        """Nyquist energy of the frames [eV]."""
        return float(np.pi * HBAR / self.interval)


def densities_of_states(trajectory: Velocities, temperature: float, lag: float) -> Vibrations:
    """Density of states of every element.

    The correlation function is unbiased and multiplied by a Hann window. Both can make the density
    slightly negative; negative values are set to zero, and their weight is reported in `Element`.

    Parameters
    ----------
    trajectory : Velocities
        Centroid velocities (or classical ones).
    temperature : float
        [K].
    lag : float
        Length of the correlation window [fs].
    """
    n_frames = len(trajectory.velocities)
    n_lags = round(lag / trajectory.interval)
    if n_lags < 16 or n_lags > n_frames // 2 + 1:
        raise DataError(
            f"A correlation window of {lag:g} fs does not fit a run of {trajectory.duration:g} fs "
            f"with a frame every {trajectory.interval:g} fs.",
            f"Choose between {16 * trajectory.interval:g} and {trajectory.duration / 2:g} fs, or run longer.",
        )
    size = padded_size(n_lags, trajectory.interval)
    step = 2 * np.pi * HBAR / (size * trajectory.interval)
    energies = step * np.arange(size // 2 + 1)
    masses = masses_of(trajectory.symbols)
    blocks = block_slices(n_frames, n_lags)
    symbols = np.array(trajectory.symbols)
    elements = []
    for symbol in dict.fromkeys(trajectory.symbols):
        mine = symbols == symbol
        mass = float(masses[mine][0])
        elements.append(
            _element(
                symbol,
                mass,
                trajectory.velocities[:, mine],
                trajectory.interval,
                temperature,
                size,
                n_lags,
                blocks,
            )
        )
    return Vibrations(
        energies,
        tuple(elements),
        temperature,
        trajectory.interval,
        n_lags * trajectory.interval,
        trajectory.duration,
        n_frames,
        len(blocks),
        size,
    )


def _element(
    symbol: str,
    mass: float,
    velocities: Array,
    interval: float,
    temperature: float,
    size: int,
    n_lags: int,
    blocks: list[slice],
) -> Element:
    # <v.v> [A^2/fs^2] -> f [1/eV]: M/(3 kB T) * (2/pi) / hbar * Int C cos dt
    kinetic = mass * AMU_A2_PER_FS2 / (3 * KB * temperature)
    window = hann(n_lags)

    def density_of(acf: Array) -> Array:
        return 2 / (np.pi * HBAR) * spectral_density(acf, interval, size)

    tensors = kinetic * velocity_tensors(velocities, n_lags) * window
    acf = tensors[:, :3].sum(axis=1).mean(axis=0)
    ratio = float(acf[0])
    if not ratio > 0:
        raise DataError(
            f"The {symbol} atoms do not move.", "Release them, or leave them out of the trajectory."
        )
    raw = density_of(acf)
    clipped = np.maximum(raw, 0.0)
    step = 2 * np.pi * HBAR / (size * interval)
    norm = trapezoid(clipped, step)
    error = None
    if len(blocks) > 1:
        parts = [kinetic * velocity_tensors(velocities[b], n_lags) * window for b in blocks]
        error = standard_error(np.array([density_of(p[:, :3].sum(axis=1).mean(axis=0)) for p in parts]))
        error = error / norm
    return Element(
        symbol,
        velocities.shape[1],
        mass,
        clipped / norm,
        error,
        # factor 3: trace/3 of the tensors is the density, whose integral is one
        3 * tensors / norm,
        ratio,
        float(trapezoid(clipped - raw, step) / norm),
        # D = (1/3) Int_0^inf <v.v> dt = (pi hbar kB T / 2M) f_E(0), per eV
        float(np.pi * HBAR * KB * temperature / (2 * mass * AMU_A2_PER_FS2) * clipped[0]),
    )


def trapezoid(density: Array, step: float) -> float:
    """Integral from zero, half weight at both ends; the end value is negligible or Nyquist."""
    return float((density.sum(axis=-1) - 0.5 * density[..., 0] - 0.5 * density[..., -1]) * step)


def debye_start(density: Array, energies: Array, cut: float) -> Array:
    """A density whose part below ``cut`` is a Debye parabola, as in a solid: f ~ E^2.

    The correlation window smears every line by its width and so gives a solid a spurious density at
    E = 0, which would be diffusion. Nothing below that width is resolved in the run anyway.

    Parameters
    ----------
    density : Array
        Shape (..., n_energies).
    energies : Array
        Shape (n_energies,).
    cut : float
        Where the parabola meets the density [same unit as ``energies``].
    """
    meet = max(1, int(np.searchsorted(energies, cut)))
    started = density.copy()
    started[..., :meet] = density[..., meet : meet + 1] * (energies[:meet] / energies[meet]) ** 2
    return started


def looks_liquid(trajectory: Velocities) -> tuple[bool, str]:
    """Whether the slowest-moving element diffuses, and the numbers that say so.

    The mean square displacement of a solid levels off, that of a liquid grows in proportion to time.
    Called a liquid when it grows by more than half between a quarter and a half of the run, to more
    than 1 Angstrom^2. The heaviest element is asked, since light atoms of turning molecules travel
    without diffusing.
    """
    masses = masses_of(trajectory.symbols)
    heavy = masses == masses.max()
    half = len(trajectory.velocities) // 2
    early, late = mean_square_displacement(
        trajectory.velocities[:, heavy], trajectory.interval, np.array([half // 2, half])
    )
    name = trajectory.symbols[int(np.argmax(heavy))]
    times = half // 2 * trajectory.interval, half * trajectory.interval
    numbers = (
        f"<dr^2> of {name} is {early:.3g} A^2 after {times[0]:.0f} fs and {late:.3g} A^2 after "
        f"{times[1]:.0f} fs"
    )
    return bool(late > 1.0 and late > 1.5 * early), numbers
