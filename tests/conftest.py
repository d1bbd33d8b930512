"""What several test files share: the shipped model, a served pool, a small crystal."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

# A shell that starts the tests in the background ignores Ctrl-C for them, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/ammonia/models/small/ammonia-small.nequip.zip"
INPUT = ROOT / "ipi_inputs/ammonia-solid-trpmd/input.xml"


@pytest.fixture(scope="session")
def model_path() -> Path:
    return MODEL


@pytest.fixture(scope="session")
def potential():
    """The shipped model, compiled for this machine, in this process."""
    import torch

    from nnqmd_server.potentials.allegro import load

    torch.set_num_threads(1)
    return load(MODEL)


@pytest.fixture(scope="session")
def pool(tmp_path_factory, potential):
    """A pool of two workers that serves the shipped model (compiled already by ``potential``)."""
    from nnqmd_server.pool.launch import LocalPool

    logs = tmp_path_factory.mktemp("pool-logs")
    with LocalPool({"ammonia": str(MODEL)}, logs, workers=2, device="cpu") as running:
        running.wait_ready(timeout=280)
        yield running


def crystal(shake: float = 0.05, seed: int = 7, repeat: tuple[int, int, int] = (1, 1, 1)) -> Atoms:
    """The initial structure of the shipped input (or one 16-atom cell of it), with atoms moved a little."""
    from ase.io import read

    whole = read(ROOT / "ipi_inputs/ammonia-solid-trpmd/init.xyz", format="xyz")
    cell = whole[:16]
    cell.set_cell([5.13] * 3)
    cell.pbc = True
    cell = cell.repeat(repeat)
    rng = np.random.default_rng(seed)
    cell.positions += rng.normal(scale=shake, size=cell.positions.shape)
    return cell


def triclinic(shake: float = 0.05, seed: int = 3) -> Atoms:
    """The 16-atom crystal in a sheared cell that no axis order can hide."""
    atoms = crystal(shake, seed)
    strain = np.array([[1.02, 0.04, -0.03], [0.0, 0.99, 0.06], [0.0, 0.0, 1.03]])
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    return atoms
