"""Potentials for worker processes that behave as told; they need numpy only."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import Results

FITS = 3
"""Structures that fit into the memory of `small_memory` at once."""


class Odd:
    """Energy = sum of x, forces = -1e-3 sin(positions); before that it does what ``first`` says."""

    def __init__(self, first=lambda structures: None, form="odd"):
        self.card = Card("odd", "0" * 64, ("N", "H"), 0.0, "float64")
        self.form = form
        self._first = first

    def evaluate(self, structures):
        self._first(structures)
        energy = np.add.reduceat(structures.positions[:, 0], structures.offsets[:-1])
        return Results(energy, -1e-3 * np.sin(structures.positions), np.zeros((len(structures), 3, 3)))


def quick(device):
    """Takes a few milliseconds, so that kills fall into the middle of something."""
    return Odd(lambda structures: time.sleep(2e-3 * len(structures)))


def slow(device):
    """Half a second for each batch."""
    return Odd(lambda structures: time.sleep(0.5 if structures.n_atoms != 27 else 0))


def small_memory(device):
    """A GPU that holds a few structures; writes down what was tried, in $ODD_LOG."""

    def first(structures):
        with Path(os.environ["ODD_LOG"]).open("a") as log:
            log.write(f"{len(structures)}\n")
        if len(structures) > FITS:
            raise MemoryError("staged")

    return Odd(first)


def no_memory(device):
    """Does not even hold one, but for the lattice that it is warmed up with."""

    def first(structures):
        if structures.n_atoms != 27:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    return Odd(first)


def holds_the_lock(device):
    """Keeps Python's lock for 5 s, as foreign code may: no other thread of the process runs meanwhile."""

    def first(structures):
        if structures.n_atoms != 27:
            ctypes.PyDLL(None).usleep(5_000_000)

    return Odd(first)


def confesses(device):
    """Says in which environment it runs and what it finds there."""
    found = [name for name in ("torch", "ase", "yaml", "numpy", "zmq") if find_spec(name)]
    return Odd(form=f"{sys.prefix} {' '.join(found)}")
