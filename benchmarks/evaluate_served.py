"""Forces through the pool beside the bare model, for benchmarks/evaluate.py."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from evaluate_inputs import BEADS, MODEL, Figures, must_agree, record, spread

CHUNK = 5
"""Force sets after which the sides take turns: a shared machine drifts within seconds."""
LENGTHS = {64: (80, 50), 256: (40, 15)}
"""Force sets of a run that are passed over, and those after them that are used, by atoms."""
TURNS = ("bare", "in_step", "evaluated", "served")


def _tensors(structures: object, card: object) -> list[dict]:
    """What the compiled model takes, made beforehand, for each structure."""
    import torch
    from ase.data import chemical_symbols
    from nequip.data import AtomicDataDict as Key
    from vesin import NeighborList

    types = {symbol: k for k, symbol in enumerate(card.elements)}
    lists = NeighborList(cutoff=card.cutoff, full_list=True)
    found = []
    for k in range(len(structures)):
        one = structures[k : k + 1]
        i, j, shifts = lists.compute(one.positions, one.cells[0], periodic=True, quantities="ijS")
        arrays = {
            Key.POSITIONS_KEY: one.positions,
            Key.EDGE_INDEX_KEY: np.stack([i, j]).astype(np.int64),
            Key.ATOM_TYPE_KEY: np.array([types[chemical_symbols[z]] for z in one.numbers]),
            Key.CELL_KEY: one.cells,
            Key.EDGE_CELL_SHIFT_KEY: shifts.astype(np.float64),
            Key.BATCH_KEY: np.zeros(one.n_atoms, dtype=np.int64),
            Key.NUM_NODES_KEY: np.array([one.n_atoms]),
        }
        found.append({name: torch.from_numpy(np.array(a, order="C")) for name, a in arrays.items()})
    return found


def _compute(barrier: object, orders: object, answers: object, sets: list) -> None:
    """A process with a worker's environment that evaluates its part of every force set when it is told."""
    import torch
    from nequip.model.inference_models import load_compiled_model

    from nnqmd_server.potentials.allegro import load
    from nnqmd_server.potentials.compiled import compiled_model
    from nnqmd_server.potentials.package import read_card

    torch.set_num_threads(1)
    card = read_card(MODEL)
    file, why = compiled_model(MODEL, card, "cpu")
    if file is None:
        answers.put(why)
        return
    model, _ = load_compiled_model(str(file), "cpu")
    potential = load(MODEL, "cpu")
    inputs = [_tensors(one, card) for one in sets]
    for _ in range(3):
        model(inputs[0][0])
        potential.evaluate(sets[0])
    forces = np.concatenate([model(data)["forces"].numpy() for data in inputs[0]])
    answers.put((forces, potential.evaluate(sets[0]).forces))
    while (order := orders.get(timeout=900)) != "end":
        order, part = order
        barrier.wait(timeout=600)
        before, start = dict(potential.spent), time.perf_counter()
        if order in {"bare", "in_step"}:
            for one in inputs[part]:
                for data in one:
                    model(data)
                if order == "in_step":  # as in a simulation, where all beads make a step together
                    barrier.wait(timeout=600)
        else:
            for one in sets[part]:
                potential.evaluate(one)
        spent = time.perf_counter() - start
        stages = {name: potential.spent[name] - before[name] for name in before}
        answers.put((spent, stages))


class Processes:
    """Processes like workers that share every force set among them, without any server."""

    def __init__(self, workers: int, sets: list) -> None:
        from nnqmd_server.pool.cutting import cut
        from nnqmd_server.pool.processes import worker_settings

        context = multiprocessing.get_context("spawn")
        self._barrier = context.Barrier(workers)
        self._queues, self._all = [], []
        settings = worker_settings()
        kept = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)  # inherited by the processes
        first = 0
        for count in cut(len(sets[0]), [1.0] * workers):
            part = [one[first : first + count] for one in sets]
            first += count
            queues = context.Queue(), context.Queue()
            process = context.Process(target=_compute, args=(self._barrier, *queues, part), daemon=True)
            process.start()
            self._queues.append(queues)
            self._all.append(process)
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        found = [answers.get(timeout=900) for _, answers in self._queues]
        if any(isinstance(one, str) for one in found):
            sys.exit(f"no bare model to compare with: {found[0]}")
        self.forces = np.concatenate([one[0] for one in found])
        own = np.concatenate([one[1] for one in found])
        must_agree("bare model and potential", self.forces, own)

    def measure(self, order: str, part: slice) -> tuple[float, float, dict[str, float]]:
        """Seconds of the slowest process for some of the force sets, of all together, and in their stages."""
        for orders, _ in self._queues:
            orders.put((order, part))
        found = [answers.get(timeout=900) for _, answers in self._queues]
        stages = {name: sum(one[1][name] for one in found) for name in found[0][1]}
        return max(one[0] for one in found), sum(one[0] for one in found), stages

    def end(self) -> None:
        """Let them end."""
        for orders, _ in self._queues:
            orders.put("end")
        for process in self._all:
            process.join(20)
            process.kill()


def _ask(address: str, sets: list, orders: object, answers: object) -> None:
    from nnqmd_server.pool.client import PoolClient

    client = PoolClient(address, patience=300.0)
    answers.put(client.submit(sets[0]).forces)
    while (part := orders.get(timeout=900)) != "end":
        start = time.perf_counter()
        for one in sets[part]:
            client.submit(one)
        answers.put(time.perf_counter() - start)
    client.close()


def served(figures: Figures, folder: Path, workers: int, rounds: int, sizes: Sequence[int]) -> None:
    """Bare calls of the compiled model, a worker's potential, and the pool, in turn."""
    from nnqmd_server.pool.launch import LocalPool

    context = multiprocessing.get_context("spawn")
    for atoms in sizes:
        skip, keep = LENGTHS[atoms]
        with LocalPool(
            {"ammonia": str(MODEL)}, folder / f"logs-{atoms}", workers=workers, device="cpu"
        ) as pool:
            pool.wait_ready()
            sets = record(folder / f"record-{atoms}", pool, atoms, BEADS, skip, keep)
            bare = Processes(workers, sets)
            orders, answers = context.Queue(), context.Queue()
            client = context.Process(target=_ask, args=(pool.address, sets, orders, answers), daemon=True)
            client.start()
            worst = must_agree("bare model and pool", bare.forces, answers.get(timeout=300))
            found: dict[str, list[float]] = {name: [] for name in (*TURNS, "share", "lists")}
            for k in range(rounds):
                spent = dict.fromkeys((*TURNS, "all", "lists", "model"), 0.0)
                for first in range(0, len(sets), CHUNK):
                    part = slice(first, first + CHUNK)
                    spent["bare"] += bare.measure("bare", part)[0]
                    spent["in_step"] += bare.measure("in_step", part)[0]
                    orders.put(part)
                    spent["served"] += answers.get(timeout=900)
                    slowest, every, stages = bare.measure("evaluate", part)
                    spent["evaluated"] += slowest
                    spent["all"] += every
                    spent["lists"] += stages["lists"]
                    spent["model"] += stages["model"]
                for name in TURNS:
                    found[name].append(1e3 * spent[name] / len(sets))
                found["share"].append(1.0 - spent["model"] / spent["all"])
                found["lists"].append(spent["lists"] / spent["all"])
                now = ", ".join(f"{name} {found[name][-1]:.2f}" for name in TURNS)
                print(f"{atoms} atoms, round {k + 1}: {now} ms per force set", flush=True)
            orders.put("end")
            client.join(20)
            bare.end()
        for one, other in (("served", "bare"), ("served", "in_step"), ("evaluated", "bare")):
            ratios = [a / b for a, b in zip(found[one], found[other], strict=True)]
            spread(figures, f"{one}_over_{other}.{atoms}", ratios)
        spread(figures, f"list_share.{atoms}", found["lists"])
        spread(figures, f"beyond_model_share.{atoms}", found["share"])
        for name in ("bare", "served"):
            figures[f"{name}_ms_per_bead.{atoms}"] = statistics.median(found[name]) / BEADS
        figures[f"served_force_difference.{atoms}"] = worst
