"""Plain-text tables whose header says how every number was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnqmd_server import __version__
from nnqmd_server.errors import OutputError
from nnqmd_server.spectra.inelastic import QUASI_ELASTIC, NeutronSpectrum
from nnqmd_server.spectra.infrared import InfraredSpectrum
from nnqmd_server.units import EV_PER_INVCM, MEV_PER_INVCM

Array = np.ndarray


def write_ins(path: Path, spectrum: NeutronSpectrum, notes: Sequence[str] = ()) -> None:
    """Write an INS spectrum; the first columns stand in the order of OCLIMAX's csv files."""
    v = spectrum.vibrations
    banks = [bank.name for bank in spectrum.instrument.banks]
    names = ["deltaE[cm^-1]", *(f"total-{b}" for b in banks)]
    columns = [spectrum.energy, *spectrum.total]
    cumulative = np.cumsum(spectrum.orders[0], axis=0)
    names += [f"{banks[0]}-0-{n}" for n in (1, 2, 3)] + [f"{banks[0]}-0-4+"]
    columns += list(cumulative[1:])
    names += ["deltaE[meV]", *(f"Q-{b}[1/A]" for b in banks)]
    columns += [spectrum.energy * MEV_PER_INVCM, *spectrum.Q]
    for part in spectrum.elements:
        names += [f"{part.symbol}-{b}" for b in banks]
        columns += list(part.intensity.sum(axis=1))
    for element in v.elements:
        names.append(f"vdos-{element.symbol}[cm]")
        columns.append(_at(spectrum.energy, v.energies, element.density))
        if element.error is not None:
            names.append(f"sem-{element.symbol}[cm]")
            columns.append(_at(spectrum.energy, v.energies, element.error))
    _write(path, ins_header(spectrum) + [f"note: {n}" for n in notes], names, columns)


def write_ir(path: Path, spectrum: InfraredSpectrum, notes: Sequence[str] = ()) -> None:
    """Write an infrared spectrum."""
    names = ["wavenumber[cm^-1]", "n*alpha[cm^-1]", "n*alpha-dipole-route[cm^-1]"]
    columns = [spectrum.wavenumber, spectrum.absorption, spectrum.from_dipole]
    if spectrum.error is not None:
        names.append("sem[cm^-1]")
        columns.append(spectrum.error)
    _write(path, ir_header(spectrum) + [f"note: {n}" for n in notes], names, columns)


def ins_header(spectrum: NeutronSpectrum) -> list[str]:
    """Formulas, prefactors, units and limits of an INS spectrum, line by line."""
    v, instrument = spectrum.vibrations, spectrum.instrument
    angles = ", ".join(f"{b.name} {b.angle:g} deg" for b in instrument.banks)
    s0, s1, s2 = instrument.sigma
    lines = [
        f"Incoherent inelastic neutron scattering on {instrument.name}; nnqmd-server {__version__}",
        "I(E) = (1/N) Sum_i (sigma_i/4pi) S_i(Q(E),E) [barn/(sr meV)] per atom of the cell; no factor kf/ki;",
        "  sigma_i: total bound cross-section (incoherent approximation: no interference between atoms);",
        "  E > 0: the neutron loses energy",
        "S(Q,E) = (1/2 pi hbar) Int dt exp(-iEt/hbar) exp(-Q^2 gamma(t)), all orders;",
        "gamma(t) = (hbar/2M) Int_0^inf dw f(w)/w {coth(hbar w/2kT)[1-cos wt] - i sin wt};",
        "f(w) = (2M/(3 pi kB T)) Int_0^inf <v(0).v(t)> cos(wt) dt, Int f dw = 1; <v.v> from the centroid",
        "  velocities (Kubo-transformed); vdos columns: f per cm^-1, mean over the atoms of an element;",
        "  sem columns: standard error of the mean over blocks",
    ]
    if spectrum.solid:
        lines.append(
            "solid: f is a parabola (Debye) below the resolution of the run, "
            f"{v.resolution / EV_PER_INVCM:.1f} cm^-1; order 0 is the elastic line exp(-Q^2<u^2>)"
        )
    else:
        lines.append(
            "liquid: f as it is, quasi-elastic line included; orders count quanta above "
            f"{QUASI_ELASTIC / EV_PER_INVCM:.0f} cm^-1, slower motion belongs to order 0"
        )
    lines += [
        "powder average: orders 1 and 2 almost isotropic (alpha = (1/5){Tr A + 2 B:A/Tr B}), others isotropic"
        if spectrum.anisotropic
        else "powder average: isotropic",
        f"geometry: Ef = {instrument.final_energy:g} cm^-1, {angles};",
        "  Q^2 = (2 m_n/hbar^2) [2Ef + E - 2 sqrt(Ef(Ef+E)) cos(angle)]",
        f"resolution: Gaussian, sigma = {s0:g} + {s1:g} E + {s2:g} E^2 [cm^-1];",
        f"  {instrument.source}",
        f"T = {v.temperature:g} K; {v.n_frames} frames, one every {v.interval:g} fs: {v.duration:g} fs; "
        f"highest energy (Nyquist) {v.highest / EV_PER_INVCM:.0f} cm^-1",
        f"window: Hann, {v.lag:g} fs: a sharp line of the run is {v.resolution / EV_PER_INVCM:.1f} cm^-1 "
        "wide (FWHM), before the instrument",
        f"blocks behind the standard errors: {v.n_blocks}"
        + ("" if v.n_blocks > 1 else " (none: the run is too short)"),
    ]
    for part, element in zip(spectrum.elements, v.elements, strict=True):
        lines.append(
            f"{part.symbol}: {element.count} atoms, M = {element.mass:.5f} amu, "
            f"sigma = {part.cross_section:g} barn, <u^2> along Q = {part.displacement:.5f} A^2, "
            f"kinetic energy = {1e3 * part.kinetic_energy:.2f} meV, "
            f"M<v^2>/3kT = {element.kinetic_ratio:.4f} before normalising, "
            f"negative density removed = {100 * element.clipped:.2f} %"
        )
    return lines


def ir_header(spectrum: InfraredSpectrum) -> list[str]:
    """Formulas, prefactors, units and limits of an infrared spectrum, line by line."""
    s = spectrum
    kind = (
        f"bead average over {s.n_beads} beads (Kubo-transformed)" if s.n_beads > 1 else "classical (1 bead)"
    )
    return [
        f"Infrared absorption; nnqmd-server {__version__}",
        "n(w)alpha(w) = 1/(6 eps0 c V kB T) Int_-inf^inf dt exp(-iwt) <J(0).J(t)>, J = dM/dt, in cm^-1",
        "  (n: refractive index, alpha: absorption coefficient, natural logarithm; SI units, 1/m -> 1/cm);",
        "  small negative values are side lobes of the window or noise, and are kept",
        f"M: dipole of the cell, {kind}; no further quantum factor",
        f"J: difference of neighbouring dipoles / {s.interval:g} fs, "
        "spectrum divided by [sin(w dt/2)/(w dt/2)]^2",
        "dipole route (check): w^2/(6 eps0 c V kB T) Int dt exp(-iwt) <M(0).M(t)>",
        f"T = {s.temperature:g} K; V = {s.volume:.4f} A^3 (mean); {s.n_frames} frames, "
        f"one every {s.interval:g} fs: {s.duration:g} fs",
        f"window: Hann, {s.lag:g} fs: a sharp line is {s.resolution:.1f} cm^-1 wide (FWHM)",
        f"blocks behind the standard error: {s.n_blocks}"
        + ("" if s.n_blocks > 1 else " (none: the run is too short)"),
        f"sum rule: Int n alpha dnu = {s.measured_sum:.6g} cm^-2; "
        f"<J^2>/(12 eps0 c^2 V kB T) = {s.expected_sum:.6g} cm^-2",
        f"branch jumps removed (e times cell vectors): {s.n_jumps}",
    ]


def _at(wavenumber: Array, energies: Array, density: Array) -> Array:
    """A density per eV at wavenumbers, per cm^-1; zero below E = 0."""
    return np.interp(wavenumber, energies / EV_PER_INVCM, density, left=0.0) * EV_PER_INVCM


def _write(path: Path, header: list[str], names: list[str], columns: list[Array]) -> None:
    title = " ".join(f"{n:>15s}" for n in names)
    try:
        np.savetxt(path, np.array(columns).T, fmt="%15.7e", header="\n".join([*header, title]))
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error}).", "Choose another directory with --out."
        ) from error
