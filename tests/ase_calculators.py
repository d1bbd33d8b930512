"""ASE calculators that behave as told, for tests/test_adapters.py: ``ase:tests/ase_calculators.py:NAME``."""

from __future__ import annotations

import numpy as np
from ase.calculators.calculator import (
    CalculationFailed,
    Calculator,
    PropertyNotImplementedError,
    all_changes,
)


class Springs(Calculator):
    """Springs to the origin with k = 1 eV/Angstrom^2, a dipole and charges; no stress."""

    implemented_properties = ("energy", "free_energy", "forces", "dipole", "charges")
    default_parameters = {"entropy": 0.0, "device": "none"}  # noqa: RUF012

    def calculate(self, atoms=None, properties=(), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        q = self.atoms.positions
        free = 0.5 * (q**2).sum()
        self.results = {
            "energy": free + self.parameters["entropy"],
            "free_energy": free,
            "forces": -q,
            "dipole": q.sum(axis=0) + self.atoms.info.get("shift", 0.0),
            "charges": self.atoms.get_initial_charges() + q[:, 1],
        }


class Fails(Springs):
    """Does not converge where an atom is beyond x = 100, and gives NaN where one is beyond y = 100."""

    implemented_properties = (*Springs.implemented_properties, "stress")

    def calculate(self, atoms=None, properties=(), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if (self.atoms.positions[:, 0] > 100).any():
            raise CalculationFailed("SCF not converged in 50 iterations")
        if (self.atoms.positions[:, 1] > 100).any():
            self.results["forces"] = np.full_like(self.results["forces"], np.nan)
        self.results["stress"] = np.zeros(6)


class Claims(Springs):
    """Names more properties than it has, as metatomic's does, and refuses those that it lacks."""

    def calculate(self, atoms=None, properties=(), system_changes=all_changes):
        if "free_energy" in properties:
            raise PropertyNotImplementedError("free_energy")
        super().calculate(atoms, properties, system_changes)
        del self.results["free_energy"]


class Broken(Springs):
    """Promises a stress and gives none; forces of another shape where there is one atom."""

    implemented_properties = (*Springs.implemented_properties, "stress")

    def calculate(self, atoms=None, properties=(), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if len(self.atoms) == 1:
            self.results["forces"] = np.zeros((2, 3))


def with_device(device, size=1):
    """A function that is given the worker's device."""
    return Springs(device=f"{device}{size}")


def nothing():
    """Not a calculator."""
    return 3


def raises():
    """Needs something that is not there."""
    raise OSError("no licence")
