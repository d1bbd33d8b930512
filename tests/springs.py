"""A pool that is none: springs to the origin, as i-PI's own ``harmonic`` potential has them, at no cost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from conftest import INPUT

from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.socket import SocketDoor, serve_in_thread
from nnqmd_server.doors.template import read_numbers
from nnqmd_server.pool.client import GivenUpError
from nnqmd_server.structures import Results
from nnqmd_server.units import BOHR, HARTREE

SPRING = 0.02
"""Spring constant [hartree/bohr^2]."""
NUMBERS = read_numbers(INPUT.parent / "init.xyz")


class Springs:
    """Stands for a :class:`~nnqmd_server.pool.client.PoolClient`; counts what it is asked.

    Parameters
    ----------
    spring : float
        Spring constant [hartree/bohr^2].
    seconds : float
        How long an evaluation takes.
    """

    def __init__(self, spring: float = SPRING, seconds: float = 0.0) -> None:
        self.spring = spring * HARTREE / BOHR**2
        self.seconds = seconds
        self.calls: list[int] = []
        self.closed = 0

    def card(self) -> dict:
        return {"name": "springs", "sha256": "0" * 64, "properties": ["dipole"]}

    def submit(self, structures, given_up=None) -> Results:
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            if given_up is not None and given_up():
                raise GivenUpError("gone")
            time.sleep(min(0.1, self.seconds))
        count = len(structures)
        self.calls.append(count)
        beads = structures.positions.reshape(count, -1, 3)
        energy = 0.5 * self.spring * np.einsum("kij,kij->k", beads, beads)
        # The "dipole" tells a bead from every other, and can be found from i-PI's positions.
        return Results(
            energy,
            -self.spring * structures.positions,
            np.zeros((count, 3, 3)),
            {"dipole": beads[:, 0].copy()},
        )

    def close(self) -> None:
        self.closed += 1


def write_input(
    folder: Path, force_field: str, beads: int, steps: int, output: str = "", init: str = ""
) -> Path:
    """An i-PI input: NVT of the ammonia crystal with any force field named ``springs``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "init.xyz").write_text(init or (INPUT.parent / "init.xyz").read_text())
    path = folder / "input.xml"
    path.write_text(
        f"""<simulation verbosity='medium' safe_stride='1000'>
  <output prefix='run'>
    <properties filename='out' stride='1'> [ step, conserved, temperature, potential ] </properties>
    {output}
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>31415</seed></prng>
  {force_field}
  <system>
    <initialize nbeads='{beads}'>
      <file mode='xyz'>init.xyz</file>
      <velocities mode='thermal' units='kelvin'>100</velocities>
    </initialize>
    <forces> <force forcefield='springs'/> </forces>
    <ensemble> <temperature units='kelvin'>100</temperature> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'>0.5</timestep>
        <thermostat mode='pile_g'> <tau units='femtosecond'>100</tau> </thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""
    )
    return path


POSITIONS = "<trajectory filename='pos' stride='1' format='xyz'> positions </trajectory>"


def start_ipi(path: Path, program: Path | None = None) -> subprocess.Popen:
    """i-PI, on an input in its own folder, output into ``i-pi.log``."""
    program = program or Path(sys.executable).parent / "i-pi"
    with (path.parent / "i-pi.log").open("w") as output:
        return subprocess.Popen(
            [program, path.name],
            cwd=path.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )


def wait_for(path: Path, ipi: subprocess.Popen, seconds: float = 20.0) -> None:
    """Until i-PI has made its socket file."""
    until = time.monotonic() + seconds
    while not path.exists() and ipi.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert path.exists(), "i-PI does not listen"


def answer(
    address, ipi, client: Springs, beads=None, batch_size=None, record=None, numbers=NUMBERS, limit=120
):
    """Serve an i-PI that has been started until it ends; the door, which must have ended too."""
    sets = ForceSets(client, numbers, beads, record)
    door = SocketDoor(address, sets, beads, batch_size, patience=30)
    thread = serve_in_thread(door)
    try:
        assert ipi.wait(limit) == 0
    finally:
        if ipi.poll() is None:
            ipi.kill()
            ipi.wait()
        thread.join(5)
    assert not thread.is_alive()
    assert door.failure is None
    assert client.closed == 1
    return door


def own_drivers(
    program: Path, where: list[str], count: int = 1, spring: float = SPRING
) -> list[subprocess.Popen]:
    """i-PI's own Python drivers with the same springs."""
    return [
        subprocess.Popen(
            [program, *where, "-m", "harmonic", "-o", str(spring)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(count)
    ]


def frames(path: Path, atoms: int = len(NUMBERS)) -> np.ndarray:
    """Positions of an i-PI xyz trajectory, (n_frames, n_atoms, 3)."""
    lines = path.read_text().splitlines()
    rows = [line.split()[1:4] for k, line in enumerate(lines) if k % (atoms + 2) > 1]
    return np.array(rows, dtype=float).reshape(-1, atoms, 3)


def positions(folder: Path, beads: int) -> np.ndarray:
    """Positions of every bead [bohr], (n_frames, n_beads, n_atoms, 3)."""
    width = len(str(beads - 1))
    return np.stack([frames(folder / f"run.pos_{k:0{width}d}.xyz") for k in range(beads)], axis=1)
