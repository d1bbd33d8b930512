"""A worker that answers by rule in a thread, so that every failure can be staged."""

from __future__ import annotations

import threading
import time

import numpy as np

from nnqmd_server.pool.link import connect
from nnqmd_server.pool.messages import Message, arrays_to_structures, pack, results_to_arrays, unpack
from nnqmd_server.structures import Results

CARD = {"name": "toy", "sha256": "a" * 64, "properties": [], "elements": ["N", "H"]}


def toy(structures):
    """Energy = sum of x, forces = positions: enough to see any mix-up of order."""
    energy = np.array([structures.positions[structures.atoms_of(k), 0].sum() for k in range(len(structures))])
    return Results(energy, structures.positions.copy(), np.zeros((len(structures), 3, 3)))


class ToyWorker(threading.Thread):
    """A worker in a thread; ``spoil`` may change or swallow its answers."""

    def __init__(self, address, pid, spoil=None, card=CARD, delay=0.0, name="toy", evaluate=toy):
        super().__init__(daemon=True)
        self.address, self.pid, self.spoil, self.card, self.delay = address, pid, spoil, card, delay
        self.name_of_potential, self.evaluate = name, evaluate
        self.shares, self.refused, self.left = [], None, threading.Event()
        self.start()

    def run(self):
        link = connect(self.address, None, "worker")
        hello = {
            "index": self.pid,
            "pid": self.pid,
            "potentials": {self.name_of_potential: {"card": self.card, "form": "toy"}},
        }
        link.send(pack(Message("ready", hello)), wait=10.0)
        while not self.left.is_set():
            frames = link.receive(0.05)
            if frames is None:
                continue
            request = unpack(frames)
            if request.kind == "who":
                link.send(pack(Message("ready", hello)))
            if request.kind in {"alive", "who"}:
                continue
            if request.kind != "evaluate":
                self.refused = request.fields.get("what")
                break
            structures = arrays_to_structures(request.arrays)
            self.shares.append(len(structures))
            time.sleep(self.delay)
            answer = Message(
                "done",
                {"share": request.fields["share"], "seconds": 0.01},
                results_to_arrays(self.evaluate(structures)),
            )
            answer = self.spoil(answer) if self.spoil else answer
            if answer is not None:
                link.send(pack(answer))
        link.close()
