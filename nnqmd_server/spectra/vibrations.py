"""Vibrational densities of states from velocity autocorrelation tensors.

    f(w) = (2 M / (3 pi kB T)) Int_0^inf <v(0).v(t)> cos(wt) dt,   Int_0^inf f dw = 1

<v.v> is the classical or the Kubo-transformed function: centroid velocities in (T)RPMD and CMD give
the latter. Energies E = hbar w are the axis here: a density is per eV, and its integral by the
trapezoid rule (half weight at E = 0) is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.correlation import padded_size, spectral_density
from nnqmd_server.spectra.cross_sections import Overrides, check_overrides, cross_section_of
from nnqmd_server.spectra.running import Correlations, velocity_correlations
from nnqmd_server.spectra.series import Velocities
from nnqmd_server.spectra.statistics import Blocks, jackknife
from nnqmd_server.spectra.trajectory import Trajectory, masses_of
from nnqmd_server.spectra.windows import Window, window, window_width
from nnqmd_server.units import AMU_A2_PER_FS2, HBAR, KB

Array = np.ndarray
Runs = Trajectory | Velocities | Sequence[Trajectory | Velocities]


@dataclass(frozen=True)
class Element:
    """All atoms of one label, or those of them in one group.

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
        Its standard error over blocks of the runs, or None where they are one block.
    tensors : Array
        Per atom, components in the order of `correlation.PAIRS`, on the scale of ``density`` (mean over
        atoms of trace/3 = density before clipping). From a run they are correlation functions in time,
        shape (count, 6, n_lags); from phonon modes densities [1/eV], shape (count, 6, n_energies).
        `Vibrations.tensor_densities` gives densities in both cases.
    kinetic_ratio : float
        M <v^2> / 3 kB T before normalising: effective over nominal temperature.
    clipped : float
        Weight of negative values that were set to zero before normalising.
    diffusion : float
        Diffusion coefficient from the zero-frequency value [Angstrom^2/fs].
    group : str
        Name of the group, empty for the atoms of a label that are in none.
    atoms : Array
        Their indices in the trajectory, shape (count,).
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
    group: str = ""
    atoms: Array | None = None

    @property
    def label(self) -> str:
        """Such as ``H``, or ``H (methyl)`` for a group."""
        return f"{self.symbol} ({self.group})" if self.group else self.symbol


@dataclass(frozen=True)
class Vibrations:
    """Densities of states of some runs or of phonon modes, on one energy grid.

    Parameters
    ----------
    energies : Array
        k * step [eV], k = 0 ..., shape (n_energies,).
    elements : tuple of Element
        In the order of first appearance; groups first.
    temperature : float
        [K].
    interval, lag, duration : float
        Time between frames, length of the window, length of all runs together [fs]; 0 for phonon modes.
    n_frames, n_blocks : int
        Frames used; independent blocks behind the standard errors.
    size : int
        Length of the zero-padded transform; step = 2 pi hbar / (size * interval).
    window : str
        Name of the window on the correlation function.
    n_runs : int
        Independent runs.
    modes : str
        Where phonon modes came from; empty for runs.
    blocks : Blocks or None
        Autocorrelation functions of the elements without window, by block of the runs, for errors of what
        follows from the densities (`densities_of`); None for phonon modes.
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
    window: Window = "hann"
    n_runs: int = 1
    modes: str = ""
    blocks: Blocks | None = None

    @property
    def step(self) -> float:
        """Spacing of the energy grid [eV]."""
        return float(self.energies[1])

    @property
    def resolution(self) -> float:
        """Full width at half maximum of a sharp line [eV]; 0 for phonon modes."""
        return 0.0 if self.modes else 2 * np.pi * HBAR * window_width(self.window, self.lag)

    @property
    def highest(self) -> float:
        """Nyquist energy of the frames, or the end of the grid of phonon modes [eV]."""
        return float(self.energies[-1])

    @property
    def n_atoms(self) -> int:
        """Atoms of all elements."""
        return sum(e.count for e in self.elements)

    def tensor_densities(self, element: Element) -> Iterator[Array]:
        """Density of states tensor of every atom of an element [1/eV], shape (6, n_energies) each."""
        for tensor in element.tensors:
            if self.modes:
                yield tensor
            else:
                yield 2 / (np.pi * HBAR) * spectral_density(tensor, self.interval, self.size)


def densities_of_states(
    runs: Runs,
    temperature: float,
    lag: float,
    groups: Mapping[str, Sequence[int] | Array] | None = None,
    window_name: Window = "hann",
    skip: float = 0.0,
    progress: Callable[[float], None] | None = None,
) -> Vibrations:
    """Density of states of every element and group, from one run or several of one ensemble.

    The correlation function is unbiased and multiplied by a window. Both can make the density slightly
    negative; negative values are set to zero, and their weight is reported in `Element`. Runs on disk are
    read as streams.

    Parameters
    ----------
    runs : Trajectory, Velocities, or a sequence of them
        Centroid velocities (or classical ones).
    temperature : float
        [K].
    lag : float
        Length of the correlation window [fs].
    groups : mapping of str to atom indices, optional
        Atoms whose density is wanted by itself. A group of several labels becomes one `Element` for each;
        no atom may be in two groups.
    window_name : str
        ``hann``, ``gaussian`` or ``none``.
    skip : float
        Time at the beginning of every run to leave out [fs].
    progress : callable, optional
        Called with the fraction read.
    """
    several = [runs] if isinstance(runs, Trajectory | Velocities) else list(runs)
    if not several:
        raise DataError("No trajectory was given.", "Name at least one.")
    first = several[0]
    interval = first.interval
    n_lags = round(lag / interval)
    if n_lags < 16:
        raise DataError(
            f"A correlation window of {lag:g} fs has fewer than 16 frames of {interval:g} fs.",
            f"Choose at least {16 * interval:g} fs (--lag).",
        )
    kinds = _kinds(first.symbols, groups)
    by_name = {f"{group}\t{symbol}": atoms for (group, symbol), atoms in kinds.items()}
    found = velocity_correlations(several, n_lags, by_name, skip, progress=progress)
    if n_lags > found.n_frames / found.n_trajectories / 2 + 1:
        duration = found.n_frames / found.n_trajectories * interval
        raise DataError(
            f"A correlation window of {lag:g} fs does not fit a run of {duration:g} fs "
            f"with a frame every {interval:g} fs.",
            f"Choose between {16 * interval:g} and {duration / 2:g} fs (--lag), or run longer.",
        )
    size = padded_size(n_lags, interval)
    step = 2 * np.pi * HBAR / (size * interval)
    masses = masses_of(first.symbols)
    shape = window(window_name, n_lags)
    elements = tuple(
        _element(k, symbol, group, atoms, float(masses[atoms[0]]), found, shape, interval, temperature, size)
        for k, ((group, symbol), atoms) in enumerate(kinds.items())
    )
    return Vibrations(
        step * np.arange(size // 2 + 1),
        elements,
        temperature,
        interval,
        n_lags * interval,
        (found.n_frames - found.n_trajectories) * interval,
        found.n_frames,
        len(found.blocks),
        size,
        window_name,
        found.n_trajectories,
        blocks=found.blocks,
    )


def densities_of(means: Array, vibrations: Vibrations) -> list[Array]:
    """Densities of states of every element [1/eV] from other means of the blocks' correlation functions.

    Parameters
    ----------
    means : Array
        Such as ``vibrations.blocks.mean`` or ``.without(k)``, shape (n_elements, n_lags).
    vibrations : Vibrations
        For the window and the grid.
    """
    shape = window(vibrations.window, means.shape[-1])
    raw = spectral_density(shape * means, vibrations.interval, vibrations.size)
    clipped = np.maximum(raw, 0.0)
    return [density / trapezoid(density, vibrations.step) for density in clipped]


def _kinds(
    symbols: tuple[str, ...], groups: Mapping[str, Sequence[int] | Array] | None
) -> dict[tuple[str, str], Array]:
    """Atoms by (group, label)."""
    labels = np.array(symbols)
    member = np.full(len(labels), "", dtype=object)
    for name, atoms in (groups or {}).items():
        indices = np.asarray(atoms, dtype=int)
        if not name or name in symbols or not len(indices):
            raise DataError(
                f"The group {name!r} is empty, or is called like an element.",
                "Name it otherwise, and list atoms.",
            )
        if indices.min() < 0 or indices.max() >= len(labels):
            raise DataError(
                f"The group {name!r} names atom {indices.max()}, but there are {len(labels)} atoms.",
                "Count atoms from 0.",
            )
        if (member[indices] != "").any() or len(np.unique(indices)) != len(indices):
            raise DataError(
                f"An atom of the group {name!r} is in a group already.", "Groups may not overlap."
            )
        member[indices] = name
    order = [*(groups or {}), ""]
    kinds = {}
    for name in order:
        for symbol in dict.fromkeys(symbols):
            atoms = np.flatnonzero((member == name) & (labels == symbol))
            if len(atoms):
                kinds[name, symbol] = atoms
    return kinds


def _element(
    place: int,
    symbol: str,
    group: str,
    atoms: Array,
    mass: float,
    found: Correlations,
    shape: Array,
    interval: float,
    temperature: float,
    size: int,
) -> Element:
    # <v.v> [A^2/fs^2] -> f [1/eV]: M/(3 kB T) * (2/pi) / hbar * Int C cos dt
    kinetic = mass * AMU_A2_PER_FS2 / (3 * KB * temperature)

    def density_of(acf: Array) -> Array:
        return 2 / (np.pi * HBAR) * spectral_density(kinetic * shape * acf, interval, size)

    acf = found.blocks.mean[place]
    ratio = float(kinetic * acf[0])
    if not ratio > 0:
        raise DataError(
            f"The {symbol} atoms do not move.", "Release them, or leave them out of the trajectory."
        )
    raw = density_of(acf)
    clipped = np.maximum(raw, 0.0)
    step = 2 * np.pi * HBAR / (size * interval)
    norm = trapezoid(clipped, step)

    def normalised(means: Array) -> Array:
        positive = np.maximum(density_of(means[place]), 0.0)
        return positive / trapezoid(positive, step)

    # of the normalised density: the kinetic energy of a block, which fluctuates, drops out of it
    error = jackknife(found.blocks, normalised).error
    assert found.tensors is not None
    return Element(
        symbol,
        len(atoms),
        mass,
        clipped / norm,
        error,
        # factor 3: trace/3 of the tensors is the density, whose integral is one
        3 * kinetic * shape * found.tensors[atoms] / norm,
        ratio,
        float(trapezoid(clipped - raw, step) / norm),
        # D = (1/3) Int_0^inf <v.v> dt = (pi hbar kB T / 2M) f_E(0), per eV
        float(np.pi * HBAR * KB * temperature / (2 * mass * AMU_A2_PER_FS2) * clipped[0]),
        group,
        atoms,
    )


def generalised_density(
    vibrations: Vibrations, part: str = "total", overrides: Overrides | None = None
) -> tuple[Array, Array | None]:
    """Neutron-weighted density of states, G(E) = Sum_i (sigma_i/M_i) f_i(E) / Sum_i (sigma_i/M_i).

    Parameters
    ----------
    vibrations : Vibrations
        Densities of states.
    part : str
        Which cross-section weighs: ``total``, ``coherent`` or ``incoherent``.
    overrides : mapping, optional
        As for `cross_sections.cross_section_of`.

    Returns
    -------
    density : Array
        [1/eV], integral one, shape (n_energies,).
    error : Array or None
        Its standard error, the elements taken as independent; None where there is none.
    """
    if part not in ("total", "coherent", "incoherent"):
        raise DataError(f"There is no cross-section {part!r}.", "Choose total, coherent or incoherent.")
    names = {e.symbol for e in vibrations.elements} | {e.group for e in vibrations.elements if e.group}
    check_overrides(overrides, names)
    weights = np.array(
        [
            e.count / e.mass * getattr(cross_section_of(e.symbol, e.group, overrides), part)
            for e in vibrations.elements
        ]
    )
    if not weights.sum() > 0:
        raise DataError(f"No atom has a {part} cross-section.", "Choose another part.")
    weights = weights / weights.sum()
    density = sum(w * e.density for w, e in zip(weights, vibrations.elements, strict=True))
    if any(e.error is None for e in vibrations.elements):
        return density, None
    return density, np.sqrt(
        sum((w * e.error) ** 2 for w, e in zip(weights, vibrations.elements, strict=True))
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
