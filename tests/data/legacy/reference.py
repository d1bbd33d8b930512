"""What the programs that made the .pth files say themselves: run in their own environment, see README.md."""

import json
import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from nequip.ase import NequIPCalculator

HERE = Path(__file__).parent
SHAPE = np.array([[0, 0, 0], [0.94, 0, 0.38], [-0.47, 0.81, 0.38], [-0.47, -0.81, 0.38]])
PLACES = np.array([[1, 1, 1], [3.8, 1.5, 3.2], [1.2, 3.9, 3.5], [4.0, 4.1, 0.9]])
CELL = np.array([[5.3, 0.4, -0.2], [0.0, 5.5, 0.3], [0.1, 0.0, 5.7]])


def structures():
    """A triclinic crystal, one that is repeated, a thin cell, and a molecule."""
    random = np.random.default_rng(5)
    positions = (SHAPE[None] + PLACES[:, None]).reshape(-1, 3) + random.normal(scale=0.05, size=(16, 3))
    crystal = Atoms("NHHH" * 4, positions, cell=CELL, pbc=True)
    double = crystal.repeat((2, 1, 1))
    double.positions += random.normal(scale=0.03, size=double.positions.shape)
    thin = Atoms("NHHH", SHAPE, cell=[[2.9, 0.2, 0], [0, 3.0, 0.3], [0.1, 0, 3.1]], pbc=True)
    # Scattered over images, as i-PI's unwrapped positions are.
    double.positions += random.integers(-3, 4, (32, 3)) @ double.cell.array
    molecule = Atoms("NHHH", SHAPE + 3.0, pbc=False)
    return {"crystal": crystal, "double": double, "thin": thin, "molecule": molecule}


found = {}
for name in sys.argv[1:]:
    calculator = NequIPCalculator.from_deployed_model(
        str(HERE / name), species_to_type_name={"H": "H", "N": "N"}
    )
    found[name] = {}
    for title, atoms in structures().items():
        atoms.calc = calculator
        atoms.get_potential_energy()
        results = calculator.results
        entry = {
            "numbers": atoms.numbers.tolist(),
            "positions": atoms.positions.tolist(),
            "cell": atoms.cell.array.tolist(),
            "pbc": atoms.pbc.tolist(),
            "energy": float(results["energy"]),
            "forces": np.asarray(results["forces"]).tolist(),
        }
        try:
            stress = atoms.get_stress(voigt=False) if atoms.pbc.all() else None
        except Exception:  # noqa: BLE001 - a model with ForceOutput has none
            stress = None
        entry["stress"] = None if stress is None else np.asarray(stress).tolist()
        found[name][title] = entry
    print(name, {k: (v["energy"], v["stress"] is not None) for k, v in found[name].items()})
print(json.dumps(found), file=(HERE / "reference.json").open("w"))
