"""Other programs, each in an environment of its own, against what they say themselves."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import ROOT
from spectra_peers import interpreter

sys.path.insert(0, str(ROOT / "benchmarks"))
from potentials import PROGRAMS, differences, prepare, structures_of_ammonia

LIMITS = {
    # float32 networks and SCF: to what they repeat; float64: to the order in which numbers are added
    "deepmd": (1e-9, 1e-9, 1e-9),
    "mace": (1e-8, 1e-8, 1e-7),
    "mattersim": (1e-3, 1e-3, 1e-2),
    "metatomic": (1e-9, 1e-9, 1e-9),
    "orb": (1e-3, 1e-3, 1e-2),
    "sevennet": (1e-3, 1e-3, 1e-2),
    "tblite": (1e-5, 1e-4, 1e-3),
}


IPI_UNITS = 2e-7
"""i-PI 3.3.1 takes 0.036749326 hartree for an eV, and 1.8897261 bohr for an Angstrom: 1e-7 from CODATA. Its
drivers convert with these what other programs say."""


@pytest.mark.peer
@pytest.mark.timeout(900)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_served_model_says_what_its_own_program_says(program, tmp_path):
    python = interpreter(program)
    structures = structures_of_ammonia()
    told = prepare(program, python, tmp_path, structures)
    assert told["sources"]
    for way, source in told["sources"].items():
        found = differences(source, python, tmp_path, structures)
        assert found["largest_force"] > 1e-2, way
        units = IPI_UNITS if source.startswith("ipi:") else 0.0
        scales = found["largest_energy"], found["largest_force"], found["largest_energy"]
        for key, limit, scale in zip(("energy", "forces", "virial"), LIMITS[program], scales, strict=True):
            assert found[key] < limit + units * scale, (way, key, found)
        assert np.isfinite(found["repeated"])
