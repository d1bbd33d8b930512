"""Calculators for the tests of `nnqmd label`, made by name in its worker processes."""

import os
import time
from pathlib import Path

from ase.calculators.emt import EMT

FAILING, CRASHING, SLOW = 2.60, 2.61, 2.62
"""The largest coordinate [Angstrom] that makes a structure fail in one way or another."""


class Told(EMT):
    """EMT that fails where it is told to and notes every calculation."""

    def __init__(self, log="", seconds=0.0):
        super().__init__()
        self.log, self.seconds = log, seconds

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        mark = round(float(atoms.positions.max()), 6)
        if mark == FAILING:
            raise RuntimeError("the SCF did not converge")
        if mark == CRASHING:
            os.abort()
        time.sleep(60.0 if mark == SLOW else self.seconds)
        super().calculate(atoms, properties, system_changes)
        if self.log:
            with Path(self.log).open("a") as stream:
                stream.write(f"{mark}\n")


def told(**options):
    return Told(**options)
