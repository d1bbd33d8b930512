"""Inputs, recordings and checks that the parts of benchmarks/evaluate.py share."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent
MODEL = ROOT / "examples/ammonia/models/small/ammonia-small.nequip.zip"
INPUT = ROOT / "ipi_inputs/ammonia-solid-trpmd/input.xml"
BEADS = 8
RING = 32
CELLS = {64: (1, 1, 1), 256: (1, 1, 4), 1024: (2, 2, 4)}  # of the shipped 64-atom cell
SAME = 2e-5
"""Forces of two sides may differ by this much [eV/Angstrom]: sums of float32 in another order."""
Figures = dict[str, float]


def write_input(folder: Path, atoms: int, beads: int, steps: int, field: str = "") -> Path:
    """The shipped input with other beads and atoms; i-PI says how long every step took."""
    folder.mkdir(parents=True)
    edges, times = np.array([10.26, 10.26, 5.13]), CELLS[atoms]
    rows = [line.split() for line in (INPUT.parent / "init.xyz").read_text().splitlines()[2:]]
    size = edges * times
    lines = [f"# CELL(abcABC): {size[0]} {size[1]} {size[2]} 90 90 90 positions{{angstrom}} cell{{angstrom}}"]
    for shift in np.ndindex(*times):
        for row in rows:
            place = np.array(row[1:4], dtype=float) + edges * shift
            lines.append(f"{row[0]} {place[0]:.6f} {place[1]:.6f} {place[2]:.6f}")
    (folder / "init.xyz").write_text("\n".join([str(len(lines) - 1), *lines]) + "\n")
    (folder / "nnqmd_pes.py").write_text((INPUT.parent / "nnqmd_pes.py").read_text())
    text = INPUT.read_text().replace("verbosity='medium'", "verbosity='high'")
    text = re.sub(r"<batch_size>\d+", f"<batch_size>{beads}", text)
    text = re.sub(r"nbeads='\d+'", f"nbeads='{beads}'", text)
    text = re.sub(r"<total_steps>\d+", f"<total_steps>{steps}", text)
    text = re.sub(r"<(trajectory|checkpoint).*?(</trajectory>|/>)", "", text, flags=re.DOTALL)
    forces = "<trajectory filename='f' stride='100000' format='xyz'> forces </trajectory>"  # of step 0
    text = text.replace("</output>", f"{forces}</output>")
    if field:
        text = re.sub(r"<ffdirect.*?</ffdirect>", field, text, flags=re.DOTALL)
    (folder / "input.xml").write_text(text)
    return folder / "input.xml"


def step_times(log: Path, first: int) -> list[float]:
    """i-PI's own milliseconds of every step from ``first`` on."""
    found = re.findall(r"at MD step +(\d+)\. t/step: +(\S+)", log.read_text(errors="replace"))
    return [1e3 * float(seconds) for step, seconds in found if int(step) >= first]


def initial_forces(folder: Path) -> np.ndarray:
    """Forces that i-PI was given for the initial structure [eV/Angstrom], of all beads."""
    from nnqmd_server.units import BOHR, HARTREE

    files = sorted(folder.glob("nh3.f_*.xyz"))
    rows = [line.split()[1:4] for file in files for line in file.read_text().splitlines()[2:]]
    if not rows:
        sys.exit(f"i-PI wrote no forces in {folder}")
    return np.array(rows, dtype=float) * HARTREE / BOHR


def must_agree(what: str, one: np.ndarray, other: np.ndarray, tolerance: float = SAME) -> float:
    """Largest difference of forces [eV/Angstrom]; the program ends when it is too large."""
    if one.shape != other.shape or not (worst := float(np.abs(one - other).max())) <= tolerance:
        sys.exit(f"{what}: the forces of the two sides differ ({one.shape} and {other.shape})")
    return worst


def record(folder: Path, pool: object, atoms: int, beads: int, skip: int, keep: int) -> list:
    """Force sets that a real run asks for, after its rings have opened."""
    from nnqmd_server.inputs.run import Run, make_folder
    from nnqmd_server.structures import Structures

    sets, seen = [], [0]

    def note(kind: str, _: object, what: object) -> None:
        if kind == "asked":
            seen[0] += 1
            if seen[0] > skip:
                arrays = what.numbers, what.positions, what.cells, what.offsets
                sets.append(Structures(*(np.array(x) for x in arrays)))  # the pool's memory is used again

    source = write_input(folder / "in", atoms, beads, skip + keep - 1)
    make_folder(folder / "run", force=False)
    pool.record(note)
    Run(source, folder / "run", pool.address).wait(lambda: None)
    pool.record(None)
    return sets


def spread(figures: Figures, name: str, values: Sequence[float]) -> None:
    """Median and range of the rounds."""
    figures[name] = statistics.median(values)
    figures[f"{name}.min"], figures[f"{name}.max"] = min(values), max(values)


def until(condition: object, process: subprocess.Popen, home: Path, seconds: float = 60.0) -> None:
    """Wait until something is so, while a process lives."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            sys.exit("\n".join(path.read_text()[-2000:] for path in home.glob("*.log")))
        time.sleep(0.01)
