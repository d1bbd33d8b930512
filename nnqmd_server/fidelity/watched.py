"""The direct door with a watch on it: every force set is judged, and i-PI ends softly at the first failure.

Loaded by i-PI in the folder of a run, where ``criteria.json`` says what counts and ``failure.json`` is
written. Steps count from the first force set of this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ipi.utils.softexit import softexit

from nnqmd_server.doors.direct import NnqmdPES
from nnqmd_server.doors.template import read_numbers
from nnqmd_server.fidelity.criteria import Failure, Watch, load_criteria, save
from nnqmd_server.structures import Array
from nnqmd_server.units import BOHR, HARTREE

__all__ = ["CRITERIA", "FAILURE", "__DRIVER_CLASS__", "__DRIVER_NAME__", "WatchedPES"]

__DRIVER_NAME__ = "nnqmd-watched"
__DRIVER_CLASS__ = "WatchedPES"

CRITERIA = "criteria.json"
FAILURE = "failure.json"


class WatchedPES:
    """A :class:`~nnqmd_server.doors.direct.NnqmdPES` whose force sets are judged; same parameters."""

    def __init__(self, template: str = "", **parameters: object) -> None:
        self._pes = NnqmdPES(template=template, **parameters)
        self._watch = Watch(load_criteria(Path(CRITERIA)), read_numbers(template))
        self._step = 0

    def __call__(self, cell: Array | Sequence[Array], pos: Array | Sequence[Array]) -> tuple | list[tuple]:
        """As the direct door; ends i-PI at a failure."""
        batched = isinstance(cell, list)
        cells = np.array(cell, dtype=float).reshape(-1, 3, 3).transpose(0, 2, 1) * BOHR
        positions = np.array(pos, dtype=float).reshape(len(cells), -1, 3) * BOHR
        self._end_at(self._watch.positions(self._step, cells, positions))
        answers = self._pes(cell, pos)
        listed = answers if batched else [answers]
        energies = np.array([answer[0] for answer in listed]) * HARTREE
        forces = np.array([answer[1] for answer in listed]).reshape(positions.shape) * (HARTREE / BOHR)
        self._end_at(self._watch.answers(self._step, energies, forces))
        self._step += 1
        return answers

    @staticmethod
    def _end_at(failure: Failure | None) -> None:
        if failure is not None:
            save(failure, Path(FAILURE))
            softexit.trigger(status="restartable", message=f" @NNQMD: {failure.words()}")
            raise SystemExit(1)
