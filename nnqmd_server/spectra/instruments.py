"""Neutron instruments: which Q belongs to an energy transfer, and how sharp they are.

An instrument has banks; a bank is one or several lines Q(E), each with a weight. Spectrometers with one
final energy have one line per bank, those with one incident energy average over a range of angles.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnqmd_server.errors import DataError, InputError
from nnqmd_server.units import EV_PER_INVCM, HBAR2_OVER_2MN, MEV_PER_INVCM

Array = np.ndarray


@dataclass(frozen=True)
class Bank:
    """Detectors at one scattering angle [degree]."""

    name: str
    angle: float


@dataclass(frozen=True)
class IndirectSpectrometer:
    """A spectrometer with one final energy.

    Parameters
    ----------
    name : str
        What it is called.
    final_energy : float
        Energy of the neutrons that the analysers let pass [cm^-1].
    banks : tuple of Bank
        Detector banks.
    sigma : tuple of float
        Coefficients of the standard deviation of its resolution: sigma(E) = s0 + s1 E + s2 E^2, in cm^-1.
    source : str
        Where the numbers come from.
    """

    name: str
    final_energy: float
    banks: tuple[Bank, ...]
    sigma: tuple[float, float, float]
    source: str

    @property
    def lowest(self) -> float:
        """Energy transfer at which the incident neutron has hardly any energy left [cm^-1]."""
        return -0.98 * self.final_energy

    @property
    def highest(self) -> float:
        """Largest energy transfer [cm^-1]."""
        return np.inf

    def lines(self, energy: Array) -> tuple[tuple[Array, Array], ...]:
        """Per bank: Q of its lines [1/Angstrom], shape (n_lines, n), and their weights, shape (n_lines,)."""
        return tuple(
            (momentum_transfer(energy, self.final_energy, bank.angle)[None], np.ones(1))
            for bank in self.banks
        )

    def width(self, energy: Array) -> Array:
        """Standard deviation of the resolution [cm^-1] at energy transfers [cm^-1]."""
        s0, s1, s2 = self.sigma
        e = np.abs(energy)
        return s0 + s1 * e + s2 * e**2


@dataclass(frozen=True)
class DirectSpectrometer:
    """A chopper spectrometer: one incident energy, all detectors together as one bank.

    The spectrum is the mean of S(Q(angle, E), E) over the detectors, each angle with the solid angle of its
    ring, sin(angle), and without the factor kf/ki (as in reduced data).

    Parameters
    ----------
    name : str
        What it is called.
    incident_energy : float
        [cm^-1].
    angles : tuple of float
        Smallest and largest scattering angle [degree].
    widths : Array
        Energy transfers and the standard deviation of the resolution there [cm^-1], shape (2, n).
    source : str
        Where the numbers come from.
    n_angles : int
        Angles in the average.
    """

    name: str
    incident_energy: float
    angles: tuple[float, float]
    widths: Array
    source: str
    n_angles: int = 24

    @property
    def banks(self) -> tuple[Bank, ...]:
        """One bank, called after its range."""
        low, high = self.angles
        return (Bank(f"{low:g}-{high:g}deg", 0.5 * (low + high)),)

    @property
    def lowest(self) -> float:
        """Largest energy gain kept [cm^-1]."""
        return -0.98 * self.incident_energy

    @property
    def highest(self) -> float:
        """Largest energy transfer: 2 % of the energy must be left [cm^-1]."""
        return 0.98 * self.incident_energy

    def lines(self, energy: Array) -> tuple[tuple[Array, Array], ...]:
        """As for `IndirectSpectrometer`: angles evenly in cos(angle), so that all weigh the same."""
        low, high = np.cos(np.radians(self.angles))
        cosines = low + (high - low) * (np.arange(self.n_angles) + 0.5) / self.n_angles
        angles = np.degrees(np.arccos(cosines))
        Q = np.array([direct_momentum_transfer(energy, self.incident_energy, a) for a in angles])
        return ((Q, np.full(self.n_angles, 1 / self.n_angles)),)

    def width(self, energy: Array) -> Array:
        """Standard deviation of the resolution [cm^-1]; outside the given range that of its end."""
        return np.interp(energy, *self.widths)


Instrument = IndirectSpectrometer | DirectSpectrometer

VISION = IndirectSpectrometer(
    name="VISION",
    final_energy=32.0,
    banks=(Bank("backward", 135.0), Bank("forward", 45.0)),
    sigma=(2.5, 0.005, 1e-7),
    source="OCLIMAX's VISION settings (Cheng et al., J. Chem. Theory Comput. 15, 1974 (2019)), "
    "the same polynomial as AbINS uses for TOSCA; a standard deviation, not a full width",
)

TOSCA = IndirectSpectrometer(
    name="TOSCA",
    final_energy=32.0,
    banks=(Bank("backward", 134.98885653), Bank("forward", 45.0)),
    sigma=(2.5, 0.005, 1e-7),
    source="AbINS's TOSCA settings (Dymkowski et al., Physica B 551, 443 (2018)); a standard deviation",
)

DIRECT_ANGLES = {"SEQUOIA": (3.0, 60.0), "ARCS": (3.0, 135.0)}
"""Nominal range of scattering angles [degree]; an experiment may mask more."""


def direct(
    name: str,
    incident_energy: float,
    resolution: str | float | Path = "resins",
    angles: tuple[float, float] | None = None,
    **settings: float | str,
) -> DirectSpectrometer:
    """A chopper spectrometer.

    Parameters
    ----------
    name : str
        ``SEQUOIA``, ``ARCS``, or any name if ``angles`` are given.
    incident_energy : float
        [meV].
    resolution : str, float or Path
        A full width at half maximum [meV] for all energy transfers; or a file of two columns, energy
        transfer [meV] and full width at half maximum [meV]; or ``resins``, for the fit of the package of
        that name.
    angles : tuple of float, optional
        Smallest and largest scattering angle [degree].
    **settings : float or str
        For resins: ``chopper_package``, ``chopper_frequency``.
    """
    if not 0.1 <= incident_energy <= 10000:
        raise InputError(f"An incident energy of {incident_energy:g} meV makes no sense.", "Give it in meV.")
    angles = angles or DIRECT_ANGLES.get(name.upper())
    if angles is None or not 0 <= angles[0] < angles[1] <= 180:
        raise InputError(
            f"The range of scattering angles of {name} is not known, or makes no sense.",
            "Give the smallest and the largest angle in degrees.",
        )
    Ei = incident_energy / MEV_PER_INVCM
    if resolution == "resins":
        widths, source = _from_resins(name, incident_energy, settings), "fit of the package resins"
    elif isinstance(resolution, str | Path):
        widths, source = _from_file(Path(resolution)), f"{Path(resolution).name}, full widths at half maximum"
    else:
        if not 0 < resolution < incident_energy:
            raise InputError(
                f"A resolution of {resolution:g} meV makes no sense.", "Give a full width in meV."
            )
        sigma = resolution / FWHM / MEV_PER_INVCM
        widths, source = np.array([[-Ei, Ei], [sigma, sigma]]), f"given: {resolution:g} meV FWHM"
    return DirectSpectrometer(name, Ei, angles, widths, source)


FWHM = 2 * np.sqrt(2 * np.log(2))
"""Full width at half maximum of a Gaussian of standard deviation one."""


def _from_resins(name: str, incident_energy: float, settings: dict[str, float | str]) -> Array:
    try:
        from resins import Instrument as Resins
        from resins.instrument import InvalidConfigurationError, InvalidInstrumentError
        from resins.models.pychop import NoTransmissionError
    except ImportError as error:
        raise InputError(
            f"The resolution of {name} needs the package resins.",
            "pip install resins, or give a full width in meV or a file of them.",
        ) from error
    transfer = np.linspace(0, 0.95, 40) * incident_energy
    try:
        model = Resins.from_default(name.upper()).get_resolution_function(e_init=incident_energy, **settings)
        sigma = np.asarray(model.get_characteristics(transfer[:, None])["sigma"], dtype=float)
    except (
        InvalidConfigurationError,
        InvalidInstrumentError,
        NoTransmissionError,
        KeyError,
        ValueError,
        TypeError,
    ) as error:
        raise InputError(
            f"resins has no resolution for {name} at {incident_energy:g} meV ({error}).",
            "Name its chopper_frequency or chopper_package; or give a full width in meV, or a file of them.",
        ) from error
    return np.array([transfer, sigma]) / MEV_PER_INVCM


def _from_file(path: Path) -> Array:
    try:
        table = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is no table of a resolution ({error}).",
            "Write two columns of numbers: energy transfer and full width at half maximum, both in meV.",
        ) from error
    if table.shape[1] != 2 or not (table[:, 1] > 0).all() or not (np.diff(table[:, 0]) > 0).all():
        raise DataError(
            f"{path} is no table of a resolution.",
            "Two columns, energy transfers ascending, full widths above zero, both in meV.",
        )
    return np.array([table[:, 0], table[:, 1] / FWHM]) / MEV_PER_INVCM


def momentum_transfer(energy: Array, final_energy: float, angle: float) -> Array:
    """Q of an indirect-geometry spectrometer [1/Angstrom].

    Q^2 = (2 m_n/hbar^2) [2 Ef + E - 2 sqrt(Ef (Ef + E)) cos(angle)]: momentum and energy conservation.

    Parameters
    ----------
    energy : Array
        Energy transfer E = Ei - Ef, more than -Ef [cm^-1].
    final_energy : float
        [cm^-1].
    angle : float
        Scattering angle [degree].
    """
    cosine = np.cos(np.radians(angle))
    square = 2 * final_energy + energy - 2 * np.sqrt(final_energy * (final_energy + energy)) * cosine
    return np.sqrt(square * EV_PER_INVCM / HBAR2_OVER_2MN)


def direct_momentum_transfer(energy: Array, incident_energy: float, angle: float) -> Array:
    """Q of a direct-geometry spectrometer [1/Angstrom].

    Q^2 = (2 m_n/hbar^2) [2 Ei - E - 2 sqrt(Ei (Ei - E)) cos(angle)].

    Parameters
    ----------
    energy : Array
        Energy transfer E = Ei - Ef, less than Ei [cm^-1].
    incident_energy : float
        [cm^-1].
    angle : float
        Scattering angle [degree].
    """
    return momentum_transfer(-np.asarray(energy), incident_energy, angle)


def kinematic_limits(instrument: Instrument, energy: Array) -> tuple[Array, Array]:
    """Smallest and largest Q that the instrument sees [1/Angstrom], shape (n,); nan where it sees nothing.

    Parameters
    ----------
    instrument : Instrument
        Of either kind.
    energy : Array
        Energy transfers [cm^-1], shape (n,).
    """
    seen = (energy >= instrument.lowest) & (energy <= instrument.highest)
    low, high = (np.full(len(energy), np.nan) for _ in range(2))
    if isinstance(instrument, DirectSpectrometer):
        low[seen], high[seen] = (
            direct_momentum_transfer(energy[seen], instrument.incident_energy, a) for a in instrument.angles
        )
    else:
        Q = np.concatenate([q for q, _ in instrument.lines(energy[seen])])
        low[seen], high[seen] = Q.min(axis=0), Q.max(axis=0)
    return low, high


def resolution(energy: Array, instrument: Instrument = VISION) -> Array:
    """Standard deviation of the instrument's Gaussian resolution [cm^-1] at an energy transfer [cm^-1]."""
    return instrument.width(energy)


def broaden(energy: Array, values: Array, target: Array, sigma: Array) -> Array:
    """Spread every point of a spectrum by its own Gaussian.

    The width belongs to the true energy transfer, not to where the count is shown, so that every
    line keeps its area.

    Parameters
    ----------
    energy : Array
        Even grid of true energy transfers, ascending, shape (n,).
    values : Array
        Densities on it, shape (..., n).
    target : Array
        Energies of the result, same unit, shape (m,).
    sigma : Array
        Standard deviation of each point, same unit, a slowly varying function of energy, shape (n,).

    Returns
    -------
    Array
        Densities, shape (..., m).
    """
    step = energy[1] - energy[0]
    reach = 8 * np.interp(target, energy, sigma)
    first = np.searchsorted(energy, target - 1.1 * reach)
    last = np.searchsorted(energy, target + 1.1 * reach)
    result = np.empty((*values.shape[:-1], len(target)))
    for k, centre in enumerate(target):
        part = slice(first[k], last[k])
        s = sigma[part]
        kernel = np.exp(-0.5 * ((centre - energy[part]) / s) ** 2) / (np.sqrt(2 * np.pi) * s) * step
        result[..., k] = values[..., part] @ kernel
    return result
