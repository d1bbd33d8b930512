"""What a neutron instrument adds to a `Result`: Q along its banks, constants and settings."""

from __future__ import annotations

import numpy as np

from nnqmd_server.spectra.inelastic import NeutronSpectrum
from nnqmd_server.spectra.instruments import FWHM, IndirectSpectrometer, Instrument, kinematic_limits
from nnqmd_server.spectra.output.labelled import Constant, Quantity
from nnqmd_server.units import MEV_PER_INVCM


def momenta(spectrum: NeutronSpectrum) -> list[Quantity]:
    """Q along every bank; for a range of angles also along its edges."""
    instrument = spectrum.instrument
    title = "momentum transfer, "
    if isinstance(instrument, IndirectSpectrometer):
        return [
            Quantity(
                f"Q_{identifier(bank.name)}",
                Q,
                "1/angstrom",
                title + bank_title(bank.name),
                formula=_kinematics("Ef + energy", "Ef", f"angle_{identifier(bank.name)}"),
            )
            for bank, Q in zip(instrument.banks, spectrum.Q, strict=True)
        ]
    edges = [
        Quantity(
            f"Q_{name}",
            Q,
            "1/angstrom",
            f"{title}{angle:g} degrees",
            formula=_kinematics("Ei - energy", "Ei", f"angle_{name}"),
        )
        for name, angle, Q in zip(
            ("low", "high"),
            instrument.angles,
            kinematic_limits(instrument, spectrum.energy),
            strict=True,
        )
    ]
    mean = Quantity("Q_rms", spectrum.Q[0], "1/angstrom", f"{title}root mean square over the detectors")
    return [*edges, mean]


def _kinematics(variable: str, fixed: str, angle: str) -> str:
    """Q from the energies of the neutron before and after, one of them fixed."""
    return f"sqrt(({fixed} + ({variable}) - 2*sqrt({fixed}*({variable}))*cos(radians({angle})))/hbar2_2mn)"


def bank_title(name: str) -> str:
    """A bank in words: `backward bank`, `detectors at 3-60 degrees`."""
    return f"{name} bank" if name.isalpha() else f"detectors at {name.replace('deg', ' degrees')}"


def instrument_constants(instrument: Instrument) -> dict[str, Constant]:
    """Energies, angles and resolution, named for formulas."""
    if not isinstance(instrument, IndirectSpectrometer):
        low, high = instrument.angles
        return {
            "Ei": Constant(instrument.incident_energy, "1/cm", "incident energy of the neutrons"),
            "angle_low": Constant(low, "deg", "smallest scattering angle"),
            "angle_high": Constant(high, "deg", "largest scattering angle"),
        }
    constants = {"Ef": Constant(instrument.final_energy, "1/cm", "final energy of the neutrons")}
    for bank in instrument.banks:
        constants[f"angle_{identifier(bank.name)}"] = Constant(
            bank.angle, "deg", f"scattering angle, {bank_title(bank.name)}"
        )
    for name, value, unit in zip(("s0", "s1", "s2"), instrument.sigma, ("1/cm", "", "cm"), strict=True):
        constants[name] = Constant(value, unit, "resolution: sigma(E) = s0 + s1 |E| + s2 E^2")
    return constants


def instrument_settings(instrument: Instrument) -> dict[str, str]:
    """Geometry and resolution in words."""
    if isinstance(instrument, IndirectSpectrometer):
        angles = ", ".join(f"{b.name} {b.angle:g} deg" for b in instrument.banks)
        s0, s1, s2 = instrument.sigma
        return {
            "instrument": f"{instrument.name}, Ef = {instrument.final_energy:g} cm^-1, {angles}",
            "resolution": f"Gaussian, sigma = {s0:g} + {s1:g} E + {s2:g} E^2 [cm^-1]; {instrument.source}",
        }
    Ei = instrument.incident_energy * MEV_PER_INVCM
    low, high = instrument.angles
    at = ", ".join(
        f"{FWHM * float(instrument.width(x * instrument.incident_energy)) * MEV_PER_INVCM:.3g} meV at "
        f"{x * Ei:.4g} meV"
        for x in np.array([0.0, 0.5, 0.9])
    )
    return {
        "instrument": f"{instrument.name}, Ei = {Ei:g} meV, {low:g} to {high:g} deg (mean over "
        f"{instrument.n_angles} angles, even in cos)",
        "resolution": f"Gaussian, FWHM {at}; {instrument.source}",
    }


def identifier(label: str) -> str:
    """A label as part of a column's name: letters, digits and underscores."""
    return "".join(c if c.isalnum() else "_" for c in label).strip("_")
