"""What a step of i-PI costs by itself: ring polymer, thermostat, normal modes, with forces of zero."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from ase.data import chemical_symbols

from nnqmd_server.errors import ProgramError
from nnqmd_server.inputs.run import find_ipi
from nnqmd_server.structures import Array

_ZEROS = """
import numpy as np

__DRIVER_NAME__, __DRIVER_CLASS__ = "zeros", "Zeros"


class Zeros:
    def __init__(self, **_):
        pass

    def __call__(self, cell, pos):
        return [(0.0, np.zeros_like(q), np.zeros((3, 3)), "") for q in pos]
"""

_INPUT = """<simulation verbosity='high'>
  <output prefix='own'/>
  <total_steps>{steps}</total_steps>
  <prng><seed>1</seed></prng>
  <ffdirect name='zeros' threaded='False'>
    <pes>custom</pes> <pes_path>zeros.py</pes_path> <batch_size>{beads}</batch_size>
  </ffdirect>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='xyz'>init.xyz</file>
      <velocities mode='thermal' units='kelvin'>{temperature}</velocities>
    </initialize>
    <forces><force forcefield='zeros'/></forces>
    <ensemble><temperature units='kelvin'>{temperature}</temperature></ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'>{timestep}</timestep>
        <thermostat mode='pile_g'>
          <tau units='femtosecond'>100</tau> <pile_lambda>0.5</pile_lambda>
        </thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""

_STEP = re.compile(r"at MD step +(\d+)\. t/step: +(\S+)")

FIRST = 20
"""Steps that are not counted: the first ones are slower."""


def own_time(
    numbers: Array,
    places: Array,
    n_beads: int,
    temperature: float = 300.0,
    timestep: float = 0.5,
    steps: int = 100,
    limit: float = 60.0,
) -> float:
    """Milliseconds per step of i-PI alone: thermostatted ring-polymer dynamics, nothing written.

    Parameters
    ----------
    numbers : Array
        Atomic numbers, shape (n,).
    places : Array
        Positions [Angstrom], shape (n, 3).
    n_beads : int
        Beads of the ring polymer.
    temperature : float
        [K].
    timestep : float
        [fs].
    steps : int
        How many steps are run; the median of those after the first :data:`FIRST` counts.
    limit : float
        Longest time that i-PI may take [s].

    Raises
    ------
    ProgramError
        i-PI is missing, fails, or takes too long.
    """
    edge = 10.0 + float((places.max(axis=0) - places.min(axis=0)).max())  # forces are zero: any cell will do
    with tempfile.TemporaryDirectory(prefix="nnqmd-") as name:
        folder = Path(name)
        (folder / "zeros.py").write_text(_ZEROS)
        lines = [
            f"{len(numbers)}",
            f"# CELL(abcABC): {edge} {edge} {edge} 90 90 90 positions{{angstrom}} cell{{angstrom}}",
        ]
        rows = zip(numbers.tolist(), places.tolist(), strict=True)
        lines += [f"{chemical_symbols[z]} {x:.6f} {y:.6f} {w:.6f}" for z, (x, y, w) in rows]
        (folder / "init.xyz").write_text("\n".join(lines) + "\n")
        text = _INPUT.format(steps=steps, beads=n_beads, temperature=temperature, timestep=timestep)
        (folder / "input.xml").write_text(text)
        log = folder / "log"
        try:
            with log.open("w") as output:
                subprocess.run(
                    [find_ipi(), "input.xml"],
                    cwd=folder,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=True,
                )
        except subprocess.TimeoutExpired:
            raise ProgramError(
                f"i-PI alone did not do {steps} steps in {limit:.0f} s.", "Use fewer beads."
            ) from None
        except (OSError, subprocess.CalledProcessError) as error:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise ProgramError(
                f"i-PI alone failed: {' '.join(last)[:300] or error}", "Run `i-pi --help`."
            ) from error
        times = [float(t) for step, t in _STEP.findall(log.read_text()) if int(step) >= FIRST]
    if not times:
        raise ProgramError("i-PI did not say how long its steps took.", "Install i-PI 3.3.")
    times.sort()
    return 1e3 * times[len(times) // 2]
