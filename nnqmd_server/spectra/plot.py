"""Pictures of spectra, with units on every axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnqmd_server.errors import OutputError
from nnqmd_server.spectra.inelastic import NeutronSpectrum
from nnqmd_server.spectra.infrared import InfraredSpectrum
from nnqmd_server.units import EV_PER_INVCM, MEV_PER_INVCM

Array = np.ndarray

LOW_END = 1000.0
"""Right end of the second panel [cm^-1]."""

# Okabe and Ito's colours, which colour-blind readers can tell apart
_BLACK, _BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY = (
    "#000000",
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)


def plot_ins(path: Path, spectrum: NeutronSpectrum, title: str = "") -> None:
    """Banks, elements and orders over the whole range and, larger, below 1000 cm^-1."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    banks_low, banks = figure.subplots(2, 2, width_ratios=[1, 1.35])
    last = float(spectrum.energy[-1])
    for row, draw in ((banks_low, _draw_banks), (banks, _draw_orders)):
        for axes, end in zip(row, (min(LOW_END, last), last), strict=True):
            draw(axes, spectrum)
            _scale_to(axes, spectrum, end)
    for axes in (*banks_low, *banks):
        axes.set_xlabel("energy transfer (cm$^{-1}$)")
        axes.set_ylabel("intensity per atom (barn sr$^{-1}$ meV$^{-1}$)")
        axes.margins(x=0)
        meV = axes.secondary_xaxis(
            "top", functions=(lambda e: e * MEV_PER_INVCM, lambda e: e / MEV_PER_INVCM)
        )
        meV.set_xlabel("energy transfer (meV)")
    banks_low[1].legend(frameon=False, fontsize=9)
    banks[1].legend(frameon=False, fontsize=9, title=f"{spectrum.instrument.banks[0].name} bank, by order")
    v = spectrum.vibrations
    figure.suptitle(
        f"{title or 'Inelastic neutron scattering'}: S(Q(E),E) on {spectrum.instrument.name}, "
        f"T = {v.temperature:g} K\n{v.duration / 1000:.3g} ps of dynamics, lines of the run "
        f"{v.resolution / EV_PER_INVCM:.0f} cm$^{{-1}}$ wide (FWHM) before the instrument",
        fontsize=11,
    )
    _save(figure, path)


def plot_ir(path: Path, spectrum: InfraredSpectrum, title: str = "") -> None:
    """Absorption with its error band, and the dipole route as a check."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    if spectrum.error is not None:
        axes.fill_between(
            spectrum.wavenumber,
            (spectrum.absorption - spectrum.error) / 1e3,
            (spectrum.absorption + spectrum.error) / 1e3,
            color=_SKY,
            alpha=0.4,
            lw=0,
            label=f"standard error of {spectrum.n_blocks} blocks",
        )
    axes.plot(
        spectrum.wavenumber, spectrum.absorption / 1e3, color=_BLUE, lw=1.4, label="from the dipole current"
    )
    axes.plot(
        spectrum.wavenumber,
        spectrum.from_dipole / 1e3,
        color=_ORANGE,
        lw=0.9,
        ls="--",
        label="from the dipole (check)",
    )
    axes.axhline(0, color="0.7", lw=0.6, zorder=0)
    axes.set_xlim(0, np.ceil(spectrum.wavenumber[-1]))
    axes.set_xlabel("wavenumber (cm$^{-1}$)")
    axes.set_ylabel(r"$n(\omega)\,\alpha(\omega)$ (10$^3$ cm$^{-1}$)")
    axes.minorticks_on()
    axes.legend(frameon=False, fontsize=9)
    beads = f"{spectrum.n_beads} beads" if spectrum.n_beads > 1 else "classical"
    axes.set_title(
        f"{title or 'Infrared absorption'}: T = {spectrum.temperature:g} K, {beads}\n"
        f"{spectrum.duration / 1000:.3g} ps of dynamics, a sharp line is "
        f"{spectrum.resolution:.0f} cm$^{{-1}}$ wide (FWHM)",
        fontsize=11,
    )
    _save(figure, path)


def _draw_banks(axes: Axes, spectrum: NeutronSpectrum) -> None:
    for line, bank, colour in zip(spectrum.total, spectrum.instrument.banks, (_BLACK, _RED), strict=False):
        axes.plot(spectrum.energy, line, color=colour, lw=1.4, label=f"{bank.name} ({bank.angle:g}°)")
    name = spectrum.instrument.banks[0].name
    for part, colour in zip(spectrum.elements, (_SKY, _ORANGE, _GREEN, _PURPLE, _BLUE) * 20, strict=False):
        axes.plot(
            spectrum.energy,
            part.intensity[0].sum(axis=0),
            color=colour,
            lw=1,
            ls="--",
            label=f"{part.symbol}, {name}",
        )


def _draw_orders(axes: Axes, spectrum: NeutronSpectrum) -> None:
    orders = spectrum.orders[0]
    elastic = "elastic" if spectrum.solid else "quasi-elastic"
    labels = (f"0 ({elastic})", "1", "2", "3", "4 and more")
    axes.stackplot(
        spectrum.energy, orders, colors=("0.75", _BLUE, _SKY, _ORANGE, _RED), labels=labels, alpha=0.85, lw=0
    )


def _scale_to(axes: Axes, spectrum: NeutronSpectrum, end: float) -> None:
    """Limits from 0 to ``end``; the elastic line may run out of the picture."""
    sigma = spectrum.instrument.sigma[0]
    resolved = max(
        8 * sigma, 1.5 * spectrum.vibrations.resolution / EV_PER_INVCM if not spectrum.solid else 0.0
    )
    seen = (spectrum.energy > resolved) & (spectrum.energy <= end)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.15 * float(spectrum.total[:, seen].max()))


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error}).", "Choose another directory with --out."
        ) from error
