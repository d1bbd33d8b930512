"""Every unit conversion, once.

Inside the house: eV, Angstrom, femtosecond, amu, kelvin, elementary charge. i-PI speaks
hartree and bohr. Constants are CODATA values from :mod:`scipy.constants`.
"""

from scipy import constants as _c

HARTREE = _c.value("Hartree energy in eV")
"""1 hartree in eV."""

BOHR = _c.value("Bohr radius") * 1e10
"""1 bohr in Angstrom."""

ATOMIC_TIME = _c.value("atomic unit of time") * 1e15
"""1 atomic unit of time in fs."""

AMU_IN_ELECTRON_MASSES = _c.value("atomic mass constant") / _c.electron_mass
"""1 amu in electron masses."""

KB = _c.value("Boltzmann constant in eV/K")
"""Boltzmann constant in eV/K."""

HBAR = _c.value("reduced Planck constant in eV s") * 1e15
"""Reduced Planck constant in eV fs."""

AMU_A2_PER_FS2 = _c.value("atomic mass constant") * 1e10 / _c.elementary_charge
"""1 amu (Angstrom/fs)^2 in eV."""

EV_PER_INVCM = _c.h * _c.c * 100 / _c.elementary_charge
"""1 cm^-1 in eV."""

KCAL_PER_MOL = 4184.0 / (_c.N_A * _c.elementary_charge)
"""1 kcal/mol (thermochemical) in eV."""

MEV_PER_INVCM = 1e3 * EV_PER_INVCM
"""1 cm^-1 in meV."""

GPA = 1e-21 / _c.elementary_charge
"""1 GPa in eV/Angstrom^3."""

HBAR2_OVER_2MN = _c.hbar**2 / (2 * _c.neutron_mass) / _c.elementary_charge * 1e20
"""hbar^2 / 2 m_n in eV Angstrom^2."""

DEBYE = 1e-21 / _c.c / _c.elementary_charge * 1e10
"""1 debye in e Angstrom."""
