"""Runs abinslib 0.3.0 on phonon modes; called by the tests in abinslib's own environment.

    python -m venv abinslib && abinslib/bin/pip install abinslib==0.3.0 euphonic==2.1.1
    abinslib/bin/python benchmarks/peer_abinslib.py MODES.json OUT.npz SETTINGS.json

MODES.json is Euphonic's QpointPhononModes of one q-point. OUT.npz: ``first`` (modes, atoms) and ``second``
(modes, modes, atoms), intensities of order 1 and 2 in the almost-isotropic approximation, without
cross-sections, with Q of an indirect spectrometer at the energy of the line; ``energies`` in cm^-1.
"""

import json
import sys
from pathlib import Path

import numpy as np
from abinslib.almost_isotropic_incoherent import (
    calculate_almost_isotropic_incoherent_combinations,
    calculate_almost_isotropic_incoherent_fundamentals,
)
from abinslib.displacements import Displacements
from abinslib.util import calculate_indirect_q2
from euphonic import QpointPhononModes, Quantity

modes_file, out, settings_file = map(Path, sys.argv[1:4])
settings = json.loads(settings_file.read_text())
modes = QpointPhononModes.from_json_file(str(modes_file))
displacements = Displacements.from_modes(modes, Quantity(settings["temperature"], "K"))
atomic = displacements.to_atomic_displacements()
energy = modes.frequencies
final = Quantity(settings["final_energy"], "cm_1")
angle = np.radians(settings["angle"])


def q2(e: Quantity) -> Quantity:
    """Q^2 at the energy of a line."""
    return calculate_indirect_q2(e, angle, final)


pairs = energy[:, :, None, None] + energy[None, None, :, :]
first = calculate_almost_isotropic_incoherent_fundamentals(displacements, atomic, q2(energy))
second = calculate_almost_isotropic_incoherent_combinations(displacements, atomic, q2(pairs), include_dw=True)
np.savez(
    out,
    energies=energy.to("cm_1", "spectroscopy").magnitude[0],
    first=first[0],
    second=second[0, :, 0],
)
