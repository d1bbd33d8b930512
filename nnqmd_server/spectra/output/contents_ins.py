"""What a neutron spectrum consists of, as a `Result`: arrays, formulas, settings, tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnqmd_server.spectra.debye_waller import DebyeWallerCheck
from nnqmd_server.spectra.inelastic import QUASI_ELASTIC, NeutronSpectrum
from nnqmd_server.spectra.output.contents_instrument import (
    bank_title,
    identifier,
    instrument_constants,
    instrument_settings,
    momenta,
)
from nnqmd_server.spectra.output.labelled import Constant, Labelled, Quantity, Result, Table
from nnqmd_server.spectra.qe_map import ScatteringMap
from nnqmd_server.spectra.vibrations import Element, Vibrations
from nnqmd_server.units import EV_PER_INVCM, HBAR2_OVER_2MN, MEV_PER_INVCM

Array = np.ndarray

INTENSITY = "barn/(sr*meV)"

GAUSSIAN_ROUTE = (
    "S(Q,E) = (1/(2 pi hbar)) Int dt exp(-iEt/hbar) exp(-Q^2 gamma(t)), all orders at once;",
    "gamma(t) = (hbar/(2M)) Int_0^inf dw f(w)/w {coth(hbar w/(2 kB T)) [1 - cos wt] - i sin wt}",
    "  (Gaussian approximation on Kubo-transformed velocities, as in Guarini et al., arXiv:1505.03907);",
)
DENSITY = (
    "f(w) = (2M/(3 pi kB T)) Int_0^inf <v(0).v(t)> cos(wt) dt, Int_0^inf f dw = 1, mean over its atoms;",
    "  <v.v> from centroid velocities is Kubo-transformed; from a classical run it is the classical function",
)


def ins_result(
    spectrum: NeutronSpectrum,
    notes: Sequence[str] = (),
    scattering: ScatteringMap | None = None,
    name: str = "",
    errors: Array | None = None,
    check: DebyeWallerCheck | None = None,
) -> Result:
    """A neutron spectrum as a `Result`.

    Parameters
    ----------
    spectrum : NeutronSpectrum
        From `inelastic.neutron_spectrum`.
    notes : sequence of str
        Warnings, and what the reader should know.
    scattering : ScatteringMap, optional
        S(Q,E) on a grid, for the Q-E picture.
    name : str
        What was simulated; begins the title.
    errors : Array, optional
        Standard errors of the banks' totals (`uncertainty.standard_errors`), shape (n_banks, n).
    check : DebyeWallerCheck, optional
        <u^2> beside the spread of the beads.
    """
    instrument = spectrum.instrument
    data = [_spectrum(spectrum, errors)]
    if scattering is not None:
        data.append(_map(scattering))
    v = spectrum.vibrations
    title = titled(name, f"inelastic neutron scattering on {instrument.name}, {v.temperature:g} K")
    return Result(
        "ins",
        title,
        tuple(data),
        _constants(spectrum),
        (
            "I(E) = (1/N) Sum_i (sigma_i/(4 pi)) S_i(Q(E),E) [barn/(sr meV)] per atom; no factor kf/ki;",
            "  sigma_i: total bound cross-section (incoherent approximation: no interference between atoms);",
            "  E > 0: the neutron loses energy",
            *GAUSSIAN_ROUTE,
            *DENSITY,
            *_how(spectrum),
            "then broadened by the resolution: a Gaussian with the standard deviation sigma of the true E",
        ),
        _settings(spectrum),
        (_elements(spectrum),) + (() if check is None else (_debye_waller(check),)),
        (*notes, *(() if check is None else check.warnings)),
    )


def _spectrum(spectrum: NeutronSpectrum, errors: Array | None) -> Labelled:
    banks = [identifier(bank.name) for bank in spectrum.instrument.banks]
    titles = [bank_title(bank.name) for bank in spectrum.instrument.banks]
    energy = Quantity("energy", spectrum.energy, "1/cm", "energy transfer, positive for neutron energy loss")
    meV = Quantity(
        "energy_meV",
        spectrum.energy * MEV_PER_INVCM,
        "meV",
        "energy transfer",
        formula="energy * meV_per_invcm",
    )
    curves = []
    for k, (bank, title, total) in enumerate(zip(banks, titles, spectrum.total, strict=True)):
        formula = " + ".join(f"order{n}_{bank}" for n in range(5))
        error = None if errors is None else errors[k]
        curves.append(Quantity(f"total_{bank}", total, INTENSITY, f"{title}, all orders", error, formula))
    for row, (bank, title) in enumerate(zip(banks, titles, strict=True)):
        curves += [
            Quantity(f"order{n}_{bank}", values, INTENSITY, f"{title}, {_ORDERS[n]}")
            for n, values in enumerate(spectrum.orders[row])
        ]
        curves += [
            Quantity(
                f"{identifier(part.label)}_{bank}",
                part.intensity[row].sum(axis=0),
                INTENSITY,
                f"{title}, what {part.label} adds",
            )
            for part in spectrum.elements
        ]
    return Labelled("ins", "S(Q(E),E) along the banks", (energy,), tuple(curves), (meV, *momenta(spectrum)))


_ORDERS = (
    "order 0 (elastic, or quasi-elastic in a liquid)",
    "one quantum (0-1)",
    "two quanta (0-2)",
    "three quanta (0-3)",
    "four quanta and more (0-4+)",
)


def density_curves(vibrations: Vibrations, shown: Array) -> tuple[Quantity, ...]:
    """Density of states of every kind of atom [1/meV] at the energies of the mask ``shown``."""
    return tuple(
        Quantity(
            f"vdos_{identifier(e.label)}",
            1e-3 * e.density[shown],
            "1/meV",
            f"{e.label}, per atom, integral one",
            None if e.error is None else 1e-3 * e.error[shown],
        )
        for e in vibrations.elements
    )


def _map(scattering: ScatteringMap) -> Labelled:
    return Labelled(
        "map",
        "S(Q,E) of the powder",
        (
            Quantity("Q", scattering.Q, "1/angstrom", "momentum transfer"),
            Quantity("energy_transfer", scattering.energy, "1/cm", "energy transfer"),
        ),
        (Quantity("intensity", scattering.intensity, INTENSITY, "(1/N) Sum_i sigma_i/(4 pi) S_i(Q,E)"),),
    )


def _constants(spectrum: NeutronSpectrum) -> dict[str, Constant]:
    constants = {
        "T": Constant(spectrum.vibrations.temperature, "K", "temperature"),
        "meV_per_invcm": Constant(MEV_PER_INVCM, "meV*cm", "1 cm^-1 in meV"),
        "hbar2_2mn": Constant(
            HBAR2_OVER_2MN / EV_PER_INVCM, "angstrom^2/cm", "hbar^2/(2 m_n), neutron mass m_n"
        ),
        **instrument_constants(spectrum.instrument),
    }
    for part, element in zip(spectrum.elements, spectrum.vibrations.elements, strict=True):
        constants |= element_constants(element, part.cross_section)
    return constants


def element_constants(element: Element, barn: float) -> dict[str, Constant]:
    """Number, mass and cross-section of a kind of atom, named for formulas."""
    name = identifier(element.label)
    return {
        f"n_{name}": Constant(element.count, "", f"atoms of {element.label} in the cell"),
        f"M_{name}": Constant(element.mass, "amu", f"mass of {element.label}"),
        f"sigma_{name}": Constant(barn, "barn", f"total bound cross-section of {element.label}"),
    }


def _how(spectrum: NeutronSpectrum) -> list[str]:
    v = spectrum.vibrations
    lines = []
    if spectrum.vibrations.modes:
        lines.append("harmonic: f from phonon modes; order 0 is the elastic line exp(-Q^2 <u^2>)")
    elif spectrum.solid:
        lines.append(
            "solid: f is a parabola (Debye) below the resolution of the run, "
            f"{v.resolution / EV_PER_INVCM:.1f} cm^-1; order 0 is the elastic line exp(-Q^2 <u^2>)"
        )
    else:
        lines.append(
            "liquid: f as it is, quasi-elastic line included; orders count quanta above "
            f"{QUASI_ELASTIC / EV_PER_INVCM:.0f} cm^-1, slower motion belongs to order 0"
        )
    if spectrum.corrected:
        lines.append(
            "  times F_exact(Q,t)/exp(-Q^2 <dr^2>/6), both classical, from positions; then detailed balance"
        )
    lines.append(
        "powder average: orders 1 and 2 almost isotropic, alpha = (1/5){Tr A + 2 B:A/Tr B}, as AbINS; "
        "others isotropic"
        if spectrum.anisotropic
        else "powder average: isotropic"
    )
    return lines


def _settings(spectrum: NeutronSpectrum) -> dict[str, str]:
    return {
        **instrument_settings(spectrum.instrument),
        **run_settings(spectrum.vibrations),
        "cross-sections": "; ".join(
            f"{part.label}: {part.cross_section:.5g} barn" + (f" ({part.power.source})" if part.power else "")
            for part in spectrum.elements
        ),
        "treated as": ("solid" if spectrum.solid else "liquid")
        + (", corrected by the exact classical F(Q,t)" if spectrum.corrected else ""),
    }


def run_settings(v: Vibrations) -> dict[str, str]:
    """Temperature, length, window and blocks of runs, or where phonon modes came from, in words."""
    temperature = {"temperature": f"{v.temperature:g} K"}
    if v.modes:
        return {"in short": f"harmonic, from {v.modes}", **temperature, "phonon modes": v.modes}
    width = f"{v.resolution / EV_PER_INVCM:.3g} cm^-1"
    runs = f"{v.n_runs} runs" if v.n_runs > 1 else "1 run"
    return {
        "in short": f"{runs}, {v.duration / 1000:.3g} ps of dynamics, a sharp line is {width} wide (FWHM)",
        **temperature,
        "trajectory": f"{runs}, {v.n_frames} frames, one every {v.interval:g} fs: {v.duration:g} fs; highest "
        f"energy (Nyquist) {v.highest / EV_PER_INVCM:.0f} cm^-1",
        "window": f"{v.window}, {v.lag:g} fs: a sharp line is {width} wide (FWHM), before the instrument",
        "blocks behind the standard errors": f"{v.n_blocks}"
        + ("" if v.n_blocks > 1 else " (none: too short)"),
    }


def _elements(spectrum: NeutronSpectrum) -> Table:
    return Table(
        "elements",
        (
            "element",
            "atoms",
            "M (amu)",
            "sigma (barn)",
            "<u^2> along Q (A^2)",
            "kinetic energy (meV)",
            "effective T (K)",
            "negative density removed (%)",
        ),
        tuple(
            (
                part.label,
                f"{element.count}",
                f"{element.mass:.5f}",
                f"{part.cross_section:.5g}",
                f"{part.displacement:.5f}",
                f"{1e3 * part.kinetic_energy:.2f}",
                f"{element.kinetic_ratio * spectrum.vibrations.temperature:.1f}",
                f"{100 * element.clipped:.2f}",
            )
            for part, element in zip(spectrum.elements, spectrum.vibrations.elements, strict=True)
        ),
    )


def _debye_waller(check: DebyeWallerCheck) -> Table:
    return Table(
        f"Debye-Waller check, {check.n_beads} beads, {check.n_frames} frames",
        ("element", "<u^2> from the density (A^2)", "<u^2> from the beads (A^2)", "difference (%)"),
        tuple(
            (label, f"{a:.5f}", f"{b:.5f}", f"{100 * d:+.1f}")
            for label, a, b, d in zip(
                check.labels, check.from_density, check.from_beads, check.difference, strict=True
            )
        ),
    )


def titled(name: str, what: str) -> str:
    """A title that begins with a name, or with a capital."""
    return f"{name}: {what}" if name else what[0].upper() + what[1:]
