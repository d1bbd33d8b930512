"""The inelastic neutron spectrum of a run, as an indirect-geometry spectrometer shows it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra import neutron
from nnqmd_server.spectra.instruments import (
    VISION,
    IndirectSpectrometer,
    broaden,
    momentum_transfer,
    resolution,
)
from nnqmd_server.spectra.powder import element_orders
from nnqmd_server.spectra.vibrations import Element, Vibrations, debye_start, trapezoid
from nnqmd_server.units import EV_PER_INVCM

Array = np.ndarray

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
    """

    symbol: str
    cross_section: float
    displacement: float
    kinetic_energy: float
    intensity: Array


@dataclass(frozen=True)
class NeutronSpectrum:
    """S(Q(E), E) of a powder, weighted with cross-sections, on an instrument.

    Parameters
    ----------
    energy : Array
        Energy transfer, positive for neutron energy loss [cm^-1], shape (n,).
    Q : Array
        Momentum transfer [1/Angstrom], shape (n_banks, n).
    elements : tuple of ElementScattering
        In the order of first appearance.
    instrument : IndirectSpectrometer
        Geometry and resolution used.
    vibrations : Vibrations
        Where it comes from.
    solid, anisotropic : bool
        How it was computed.
    """

    energy: Array
    Q: Array
    elements: tuple[ElementScattering, ...]
    instrument: IndirectSpectrometer
    vibrations: Vibrations
    solid: bool
    anisotropic: bool

    @property
    def orders(self) -> Array:
        """All elements together [barn / (sr meV)], shape (n_banks, 5, n)."""
        return np.sum([e.intensity for e in self.elements], axis=0)

    @property
    def total(self) -> Array:
        """All elements and orders together [barn / (sr meV)], shape (n_banks, n)."""
        return self.orders.sum(axis=1)


def cross_section(symbol: str) -> float:
    """Total bound scattering cross-section of an i-PI label [barn], from periodictable.

    Isotopes are D, T or a symbol with a mass number, such as O18.
    """
    import periodictable

    match = re.fullmatch(r"([A-Z][a-z]?)(\d*)", symbol)
    try:
        if match is None or symbol == "H2":  # i-PI's H2 is a whole molecule
            raise KeyError(symbol)
        atom = periodictable.elements.symbol(match[1])
        if match[2]:
            atom = atom[int(match[2])]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"There is no neutron cross-section for {symbol!r}.",
            "Use element symbols, D and T for heavy hydrogen, or a symbol with a mass number such as C13.",
        ) from error
    if atom.neutron.total is None:
        raise DataError(f"The neutron cross-section of {symbol} is not known.", "Replace this isotope.")
    return float(atom.neutron.total)


def neutron_spectrum(
    vibrations: Vibrations,
    solid: bool = True,
    anisotropic: bool = True,
    highest: float = 4000.0,
    instrument: IndirectSpectrometer = VISION,
    progress: Callable[[float], None] | None = None,
) -> NeutronSpectrum:
    """INS spectrum of a run in the incoherent approximation, all orders.

        I(E) = (1/N) Sum_i (sigma_i / 4 pi) S_i(Q(E), E), then broadened; without the factor kf/ki

    sigma is the total cross-section of the bound atom: interference between atoms is left out.

    Parameters
    ----------
    vibrations : Vibrations
        Densities of states of the run.
    solid : bool
        A solid's density gets a Debye start below the resolution of the run, and its elastic line is
        sharp. A liquid keeps its density at E = 0, and the quasi-elastic line comes out.
    anisotropic : bool
        Orders 1 and 2 with each atom's displacement tensor (`powder`); solids only.
    highest : float
        Last energy transfer [cm^-1].
    instrument : IndirectSpectrometer
        Geometry and resolution.
    progress : callable, optional
        Called with the fraction done.
    """
    step = vibrations.step
    bins = _true_transfers(highest, instrument, step)
    energy = bins * step / EV_PER_INVCM
    Q = _along_banks(energy, instrument)
    target = np.arange(LOWEST, highest + 0.5, 1.0)
    n_atoms = sum(e.count for e in vibrations.elements)
    parts = []
    for k, element in enumerate(vibrations.elements):

        def report(done: float, k: int = k) -> None:
            if progress is not None:
                progress((k + done) / len(vibrations.elements))

        barn = cross_section(element.symbol)
        density = _density(element, vibrations, solid)
        slow_below = 0.0 if solid else QUASI_ELASTIC
        moves = neutron.motion(density, step, element.mass, vibrations.temperature, slow_below)
        S = neutron.orders_along(moves, Q, bins, report)
        if solid and anisotropic:
            S[:, 1:3] = element_orders(element, vibrations, moves, Q, bins)
        weight = element.count / n_atoms * barn / (4 * np.pi) * 1e-3  # 1/eV -> 1/meV
        parts.append(
            ElementScattering(
                element.symbol,
                barn,
                moves.debye_waller,
                neutron.mean_kinetic_energy(density, step, vibrations.temperature),
                weight * broaden(energy, S, target, resolution(energy, instrument)),
            )
        )
    return NeutronSpectrum(
        target,
        _along_banks(target, instrument),
        tuple(parts),
        instrument,
        vibrations,
        solid,
        solid and anisotropic,
    )


def _true_transfers(highest: float, instrument: IndirectSpectrometer, step: float) -> Array:
    """Energy transfers, in steps, whose broadened lines reach what is shown."""
    edge = highest + 9 * resolution(highest, instrument)
    least = -0.98 * instrument.final_energy  # at -Ef the incoming neutron would have no energy
    return np.arange(int(np.ceil(least * EV_PER_INVCM / step)), int(edge * EV_PER_INVCM / step))


def _along_banks(energy: Array, instrument: IndirectSpectrometer) -> Array:
    return np.array(
        [momentum_transfer(energy, instrument.final_energy, bank.angle) for bank in instrument.banks]
    )


def _density(element: Element, vibrations: Vibrations, solid: bool) -> Array:
    if not solid:
        return element.density
    started = debye_start(element.density, vibrations.energies, vibrations.resolution)
    return started / trapezoid(started, vibrations.step)
