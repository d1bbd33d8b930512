"""The inelastic neutron spectrum of runs or phonon modes, as a spectrometer shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nnqmd_server.spectra import neutron
from nnqmd_server.spectra.cross_sections import (
    CrossSection,
    Overrides,
    check_overrides,
    cross_section,
    cross_section_of,
)
from nnqmd_server.spectra.instruments import VISION, Instrument, broaden
from nnqmd_server.spectra.liquid import LiquidCorrection
from nnqmd_server.spectra.powder import element_orders
from nnqmd_server.spectra.vibrations import Element, Vibrations, debye_start, trapezoid
from nnqmd_server.units import EV_PER_INVCM

Array = np.ndarray

__all__ = ["ElementScattering", "NeutronSpectrum", "cross_section", "neutron_spectrum"]

LOWEST = -25.0
"""First energy transfer shown [cm^-1]: the elastic line with its gain side."""

QUASI_ELASTIC = 40 * EV_PER_INVCM
"""In a liquid, motion slower than this [eV] stays in order 0, the quasi-elastic line."""


@dataclass(frozen=True)
class ElementScattering:
    """What one element adds.

    Parameters
    ----------
    symbol : str
        i-PI's label.
    cross_section : float
        Total scattering cross-section of one bound atom [barn].
    displacement : float
        <u^2> along Q [Angstrom^2]; in a liquid of the motion faster than `QUASI_ELASTIC`.
    kinetic_energy : float
        Quantum kinetic energy per atom [eV].
    intensity : Array
        [barn / (sr meV)] per atom of the cell, banks x orders (0, 1, 2, 3, higher) x energies.
    group : str
        Name of the group of atoms, if it is one.
    power : CrossSection
        Coherent and incoherent cross-section, and where they come from.
    """

    symbol: str
    cross_section: float
    displacement: float
    kinetic_energy: float
    intensity: Array
    group: str = ""
    power: CrossSection | None = None

    @property
    def label(self) -> str:
        """Such as ``H``, or ``H (methyl)`` for a group."""
        return f"{self.symbol} ({self.group})" if self.group else self.symbol


@dataclass(frozen=True)
class NeutronSpectrum:
    """S(Q(E), E) of a powder, weighted with cross-sections, on an instrument.

    Parameters
    ----------
    energy : Array
        Energy transfer, positive for neutron energy loss [cm^-1], shape (n,).
    Q : Array
        Momentum transfer [1/Angstrom], shape (n_banks, n): of a bank of many angles the root mean square;
        nan where the instrument sees nothing.
    elements : tuple of ElementScattering
        In the order of first appearance.
    instrument : Instrument
        Geometry and resolution used.
    vibrations : Vibrations
        Where it comes from.
    solid, anisotropic : bool
        How it was computed.
    corrected : bool
        Whether a liquid was corrected by the ratio of the exact to the Gaussian classical function.
    """

    energy: Array
    Q: Array
    elements: tuple[ElementScattering, ...]
    instrument: Instrument
    vibrations: Vibrations
    solid: bool
    anisotropic: bool
    corrected: bool = False

    @property
    def orders(self) -> Array:
        """All elements together [barn / (sr meV)], shape (n_banks, 5, n)."""
        return np.sum([e.intensity for e in self.elements], axis=0)

    @property
    def total(self) -> Array:
        """All elements and orders together [barn / (sr meV)], shape (n_banks, n)."""
        return self.orders.sum(axis=1)


def neutron_spectrum(
    vibrations: Vibrations,
    solid: bool = True,
    anisotropic: bool = True,
    highest: float = 4000.0,
    instrument: Instrument = VISION,
    progress: Callable[[float], None] | None = None,
    overrides: Overrides | None = None,
    liquid: LiquidCorrection | None = None,
) -> NeutronSpectrum:
    """INS spectrum of runs or phonon modes in the incoherent approximation, all orders.

        I(E) = (1/N) Sum_i (sigma_i / 4 pi) S_i(Q(E), E), then broadened; without the factor kf/ki

    sigma is the total cross-section of the bound atom: interference between atoms is left out.

    Parameters
    ----------
    vibrations : Vibrations
        Densities of states of runs or modes.
    solid : bool
        A solid's density gets a Debye start below the resolution of the run, and its elastic line is
        sharp. A liquid keeps its density at E = 0, and the quasi-elastic line comes out.
    anisotropic : bool
        Orders 1 and 2 with each atom's displacement tensor (`powder`); solids only.
    highest : float
        Last energy transfer [cm^-1]; a direct-geometry instrument ends before its incident energy.
    instrument : Instrument
        Geometry and resolution.
    progress : callable, optional
        Called with the fraction done.
    overrides : mapping, optional
        Label or group -> isotope or total cross-section [barn]: deuteration, for instance. It changes
        how atoms scatter, not how they move.
    liquid : LiquidCorrection, optional
        Exact classical scattering functions (`liquid.correction_of`), which correct the Gaussian
        approximation of a liquid; not for solids.
    """
    names = {e.symbol for e in vibrations.elements} | {e.group for e in vibrations.elements if e.group}
    check_overrides(overrides, names)
    if solid:
        liquid = None
    step = vibrations.step
    end = min(highest, instrument.highest)
    bins = true_transfers(end, instrument, step)
    energy = bins * step / EV_PER_INVCM
    banks = instrument.lines(energy)
    Q = np.concatenate([lines for lines, _ in banks])
    target = np.arange(max(LOWEST, np.ceil(instrument.lowest)), np.floor(end) + 0.5, 1.0)
    parts = []
    for k, element in enumerate(vibrations.elements):

        def report(done: float, k: int = k) -> None:
            if progress is not None:
                progress((k + done) / len(vibrations.elements))

        power = cross_section_of(element.symbol, element.group, overrides)
        density = density_for(element, vibrations, solid)
        slow_below = 0.0 if solid else QUASI_ELASTIC
        moves = neutron.motion(density, step, element.mass, vibrations.temperature, slow_below)
        if liquid is None:
            S = neutron.orders_along(moves, Q, bins, report)
        else:
            S = liquid.orders_along(k, moves, Q, bins, vibrations.temperature, report)
        if solid and anisotropic:
            S[:, 1:3] = element_orders(element, vibrations, moves, Q, bins)
        weight = element.count / vibrations.n_atoms * power.total / (4 * np.pi) * 1e-3  # 1/eV -> 1/meV
        shown = weight * broaden(energy, averaged_over_lines(S, banks), target, instrument.width(energy))
        parts.append(
            ElementScattering(
                element.symbol,
                power.total,
                moves.debye_waller,
                neutron.mean_kinetic_energy(density, step, vibrations.temperature),
                shown,
                element.group,
                power,
            )
        )
    return NeutronSpectrum(
        target,
        _mean_Q(target, instrument),
        tuple(parts),
        instrument,
        vibrations,
        solid,
        solid and anisotropic,
        liquid is not None,
    )


def density_for(element: Element, vibrations: Vibrations, solid: bool, density: Array | None = None) -> Array:
    """The density of states that scatters: a solid's has a Debye start below the resolution of the run.

    ``density`` stands for the element's own if it is given.
    """
    density = element.density if density is None else density
    if not solid:
        return density
    started = debye_start(density, vibrations.energies, vibrations.resolution)
    return started / trapezoid(started, vibrations.step)


def true_transfers(highest: float, instrument: Instrument, step: float) -> Array:
    """Energy transfers, in steps, whose broadened lines reach what is shown."""
    edge = min(highest + 9 * float(instrument.width(np.array(highest))), instrument.highest)
    least = max(instrument.lowest, LOWEST - 9 * float(instrument.width(np.array(0.0))))
    return np.arange(int(np.ceil(least * EV_PER_INVCM / step)), int(edge * EV_PER_INVCM / step))


def averaged_over_lines(S: Array, banks: tuple[tuple[Array, Array], ...]) -> Array:
    """Banks from their lines; S has shape (n_lines, n_orders, n)."""
    result, first = [], 0
    for lines, weights in banks:
        result.append(np.tensordot(weights, S[first : first + len(lines)], 1))
        first += len(lines)
    return np.array(result)


def _mean_Q(energy: Array, instrument: Instrument) -> Array:
    seen = (energy >= instrument.lowest) & (energy <= instrument.highest)
    Q = np.full((len(instrument.banks), len(energy)), np.nan)
    for row, (lines, weights) in zip(Q, instrument.lines(energy[seen]), strict=True):
        row[seen] = np.sqrt(weights @ lines**2)
    return Q
