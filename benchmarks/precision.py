"""What precision costs and loses: python benchmarks/precision.py [--device cuda] [--json FILE]

The network in float32, float64 and (on a GPU) TF32, compiled for this machine, on the frames of the
shipped data that were never trained on. The reference is the same network in float64, eager. Times are
medians over rounds in which the precisions take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from ase.io import read

from nnqmd_server.potentials.allegro import Allegro, load
from nnqmd_server.structures import from_ase

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/ammonia/models/small/ammonia-small.nequip.zip"
ROUNDS = 15


def test_frames() -> list:
    """The frames that the shipped model's card keeps for testing."""
    card = json.loads((MODEL.parent / "card.json").read_text())
    frames = read(ROOT / "examples/ammonia/data/ammonia_train.xyz", ":", parallel=False)
    return [frames[k] for k in card["data"]["frames"]["test"]]


def milliseconds(potential: Allegro, frames: list) -> float:
    """Time for one structure after another [ms per structure]."""
    started = time.perf_counter()
    for frame in frames:
        potential.evaluate(from_ase([frame]))
    return 1e3 * (time.perf_counter() - started) / len(frames)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    frames = test_frames()
    structures = from_ase(frames)
    reference = load(options.model, options.device, compiled=False, precision="float64").evaluate(structures)
    names = ["float32", "float64"] + (["tf32"] if options.device == "cuda" else [])
    found: dict[str, dict[str, float]] = {}
    large = [frame.repeat((2, 2, 1)) for frame in frames if len(frame) == 16][:4]
    # TF32 is a setting of the process: it comes last, and alone.
    for group in ([n for n in names if n != "tf32"], [n for n in names if n == "tf32"]):
        if group == ["tf32"]:
            from nnqmd_server.potentials import forms

            forms._settled.clear()
        potentials = {n: load(options.model, options.device, precision=n) for n in group}
        times: dict[str, list[float]] = {n: [] for n in group}
        for potential in potentials.values():
            milliseconds(potential, large)
        for _ in range(ROUNDS):
            for name, potential in potentials.items():
                times[name].append(milliseconds(potential, large))
        for name, potential in potentials.items():
            results = potential.evaluate(structures)
            difference = results.forces - reference.forces
            atoms = np.diff(structures.offsets)
            found[name] = {
                "form": potential.form,
                "force_rms_eV_per_A": float(np.sqrt((difference**2).mean())),
                "force_max_eV_per_A": float(abs(difference).max()),
                "energy_max_eV_per_atom": float((abs(results.energy - reference.energy) / atoms).max()),
                "virial_max_eV_per_atom": float(
                    (abs(results.virial - reference.virial).max(axis=(1, 2)) / atoms).max()
                ),
                "ms_64_atoms": statistics.median(times[name]),
            }
    largest = float(abs(reference.forces).max())
    print(f"{options.model.name} on {options.device}: {len(frames)} frames, largest force {largest:.2f} eV/A")
    print(f"{'':9}{'force error, eV/A':>22}{'energy':>12}{'virial':>12}{'ms':>9}")
    print(f"{'':9}{'rms':>11}{'max':>11}{'eV/atom':>12}{'eV/atom':>12}{'64 atoms':>9}")
    for name, row in found.items():
        values = [v for k, v in row.items() if k != "form"]
        print(f"{name:9}{values[0]:11.1e}{values[1]:11.1e}{values[2]:12.1e}{values[3]:12.1e}{values[4]:9.2f}")
        print(f"{'':9}{row['form']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
