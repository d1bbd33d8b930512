"""How well the contraction does: python check.py RUN_DIR MODEL.nequip.zip

Takes the ring polymer with which a run has ended (RUN_DIR/RESTART), computes the forces of the network on
all its beads, and prints how far the contracted forces are from them, with the bonds as reference and
without.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from bonds import bonds
from ipi.utils.nmtransform import nm_rescale

from nnqmd_server.inputs.xml import read_elements
from nnqmd_server.potentials.base import Potential
from nnqmd_server.potentials.load import load
from nnqmd_server.structures import Array, replicas
from nnqmd_server.units import BOHR


def ring_polymer(restart: Path) -> tuple[Array, Array]:
    """Positions (n_beads, 3 n_atoms) and cell, vectors as rows [Angstrom]."""
    system = ET.parse(restart).getroot().find("system")

    def numbers(path: str) -> Array:
        text = system.find(path).text.replace("[", " ").replace("]", " ").replace(",", " ")
        return np.array(text.split(), dtype=float) * BOHR

    n_beads = int(system.find("beads").get("nbeads"))
    return numbers("beads/q").reshape(n_beads, -1), numbers("cell").reshape(3, 3).T


def main() -> None:
    """Print the table."""
    restart = Path(sys.argv[1]) / "RESTART"
    beads, cell = ring_polymer(restart)
    elements = read_elements(restart)
    network, reference = load(sys.argv[2]), bonds("cpu")

    def forces(potential: Potential, positions: Array) -> Array:
        cells = np.array([cell] * len(positions))
        structures = replicas(elements, positions.reshape(len(positions), -1, 3), cells)
        return potential.evaluate(structures).forces.reshape(len(positions), -1)

    exact, stiff = forces(network, beads), forces(reference, beads)
    print(f"{len(beads)} beads; rms force on a bead {np.sqrt((exact**2).mean()):.3f} eV/A")
    print("rms deviation [eV/A]  network on  of a bead  of the centroid")
    for few in (1, 2, 4, 6, 8, 16):
        if few >= len(beads):
            continue
        rescale = nm_rescale(len(beads), few)
        contracted = rescale.b1tob2(beads)
        plain = rescale.b2tob1(forces(network, contracted))
        soft = rescale.b2tob1(forces(network, contracted) - forces(reference, contracted))
        for name, found in (("without reference", plain), ("with the bonds", stiff + soft)):
            bead = np.sqrt(((found - exact) ** 2).mean())
            centroid = np.sqrt(((found - exact).mean(axis=0) ** 2).mean())
            print(f"{name:21s}{few:4d} beads  {bead:9.4f}  {centroid:15.4f}")


if __name__ == "__main__":
    main()
