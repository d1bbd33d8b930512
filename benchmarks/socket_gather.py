"""What the socket door itself costs: i-PI's time per step with our door against i-PI's own Python driver.

32 beads of 256 atoms, a potential that costs nothing, i-PI's classic unix socket. Our door is one process;
i-PI's driver is tried with 1, 4, 8 and 32 clients. Rounds are interleaved, so that a busy machine is busy
for all. Prints the median and the best time per step, and the ratio of our door to the best driver.

    python benchmarks/socket_gather.py [--steps 401] [--rounds 3] [--beads 32] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from nnqmd_server.doors.address import ipi_address
from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.socket import SocketDoor
from nnqmd_server.structures import Results

ATOMS = 256
BIN = Path(sys.executable).parent
WAYS = {
    "our door": ("unix", False, 0),
    "our door, recording dipoles": ("unix", True, 0),
    "our door, batched": ("unix", False, -1),
    "our door, batched, shared memory": ("shm", False, -1),
    "i-pi-driver-py, 1 client": ("unix", False, 1),
    "i-pi-driver-py, 4 clients": ("unix", False, 4),
    "i-pi-driver-py, 8 clients": ("unix", False, 8),
    "i-pi-driver-py, 32 clients": ("unix", False, 32),
}


class Nothing:
    """Stands for a pool whose forces are zero and cost nothing."""

    def card(self) -> dict:
        """A model with dipoles."""
        return {"name": "nothing", "sha256": "0" * 64, "properties": ["dipole"]}

    def submit(self, structures: object, _given_up: object = None) -> Results:
        """Zeros."""
        n = len(structures)
        zeros = np.zeros((n, 3, 3))
        return Results(zeros[:, 0, 0], np.zeros((structures.n_atoms, 3)), zeros, {"dipole": zeros[:, 0]})

    def close(self) -> None:
        """Nothing to close."""


def write_input(folder: Path, name: str, mode: str, beads: int, batch: int, steps: int) -> Path:
    """A gas of 256 atoms in the ring polymer's thermostat, with no output."""
    rng = np.random.default_rng(0)
    rows = [f"H {x:.5f} {y:.5f} {z:.5f}" for x, y, z in 15 * rng.random((ATOMS, 3))]
    (folder / "init.xyz").write_text(
        f"{ATOMS}\n# CELL(abcABC): 15 15 15 90 90 90 cell{{angstrom}} positions{{angstrom}}\n"
        + "\n".join(rows)
        + "\n"
    )
    batched = f"<batch_size>{batch}</batch_size>" if batch > 1 else ""
    path = folder / "input.xml"
    path.write_text(
        f"""<simulation verbosity='medium' safe_stride='100000'>
  <output prefix='run'></output> <total_steps>{steps}</total_steps> <prng><seed>1</seed></prng>
  <ffsocket name='f' mode='{mode}'><address>{name}</address>{batched}</ffsocket>
  <system>
    <initialize nbeads='{beads}'> <file mode='xyz'>init.xyz</file>
      <velocities mode='thermal' units='kelvin'>100</velocities> </initialize>
    <forces><force forcefield='f'/></forces>
    <ensemble><temperature units='kelvin'>100</temperature></ensemble>
    <motion mode='dynamics'><dynamics mode='nvt'> <timestep units='femtosecond'>0.5</timestep>
      <thermostat mode='pile_l'><tau units='femtosecond'>100</tau></thermostat> </dynamics></motion>
  </system>
</simulation>
"""
    )
    return path


def _serve(mode: str, name: str, beads: int, batch: int, record: Path | None) -> None:
    sets = ForceSets(Nothing(), np.ones(ATOMS, dtype=np.int64), beads, record)
    SocketDoor(ipi_address(mode, name), sets, beads, batch).run()


def measure(mode: str, record: bool, clients: int, beads: int, steps: int) -> float:
    """Median over i-PI's own windows of its time per step [ms]."""
    batch = beads if clients < 0 else 1
    with tempfile.TemporaryDirectory() as place:
        folder, name = Path(place), f"bench-{os.getpid()}"
        path = write_input(folder, name, mode, beads, batch, steps)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        others: list = []
        with (folder / "log").open("w") as log:
            ipi = subprocess.Popen([BIN / "i-pi", path.name], cwd=folder, stdout=log, env=environment)
            if clients < 1:
                arguments = (mode, name, beads, batch, folder / "d.h5" if record else None)
                others = [multiprocessing.get_context("fork").Process(target=_serve, args=arguments)]
                others[0].start()
            else:
                while not Path(f"/tmp/ipi_{name}").exists() and ipi.poll() is None:
                    pass
                driver = [BIN / "i-pi-driver-py", "-u", "-a", name, "-m", "dummy"]
                others = [
                    subprocess.Popen(driver, stdout=subprocess.DEVNULL, env=environment)
                    for _ in range(clients)
                ]
            ipi.wait(600)
        for other in others:
            other.join(10) if clients < 1 else other.wait(10)
        times = re.findall(r"t/step: ([0-9.e+-]+)", (folder / "log").read_text())
    return 1e3 * float(np.median([float(x) for x in times][2:]))


def main() -> None:
    """Measure every way in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=401)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beads", type=int, default=32)
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    options = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, (mode, record, clients) in WAYS.items():
            found[way].append(measure(mode, record, clients, options.beads, options.steps))
    for way, times in found.items():
        print(f"{way:35s} {np.median(times):7.2f} ms/step   best {min(times):7.2f}")
    best = min(np.median(times) for way, times in found.items() if "driver" in way)
    ratio = float(np.median(found["our door"]) / best)
    print(f"our door / the best of i-PI's drivers: {ratio:.2f}")
    if options.json:
        figures = {f"{way} (ms/step)": float(np.median(times)) for way, times in found.items()}
        options.json.write_text(json.dumps({**figures, "our door / best driver": ratio}, indent=1))


if __name__ == "__main__":
    main()
