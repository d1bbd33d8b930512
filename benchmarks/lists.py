"""What neighbour lists and batches cost on this machine: python benchmarks/lists.py [--json FILE]

In one run, with the shipped model on one thread and beads of a ring polymer that moves as one at 100 K does:

- microseconds per bead for the edges of 32 beads from one kept list (cut by pairs.c, and by numpy), against a
  new vesin list for each bead;
- what is left to the host where a GPU cuts the pairs: finding the list of 32 beads at every step, and making
  the list of one structure that shares none, for 64, 256 and 1024 atoms;
- the share of lists and tensors in an evaluation, for 64 and 256 atoms;
- milliseconds per structure when 1, 2, 4, 8 structures go into one call of the model, for 16, 64, 256 atoms;
- structures per second of one process with 1 and 2 threads and of 2 processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from ase.io import read

from nnqmd_server.memory import keep_buffers
from nnqmd_server.potentials import pairs
from nnqmd_server.potentials.allegro import Allegro, load
from nnqmd_server.potentials.neighbours import Lists, fresh_edges
from nnqmd_server.structures import Structures, replicas

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/ammonia/models/small/ammonia-small.nequip.zip"
START = ROOT / "ipi_inputs/ammonia-solid-trpmd/init.xyz"
SPREAD = {1: 0.12, 7: 0.09}  # of a bead from its centroid, each direction [Angstrom]: TRPMD, 32 beads, 100 K
REPEATS = {16: (1, 1, 1), 64: (2, 2, 1), 256: (4, 2, 2), 1024: (4, 4, 4)}


def rings(atoms: int, beads: int, steps: int) -> list[Structures]:
    """Successive steps of a ring polymer: each bead's displacement forgets itself within some ten steps."""
    cell = read(START, format="xyz")[:16]
    cell.set_cell([5.13] * 3)
    whole = cell.repeat(REPEATS[atoms])
    rng = np.random.default_rng(1)
    scale = np.array([SPREAD[z] for z in whole.numbers])[:, None]
    away = rng.normal(size=(beads, atoms, 3))
    centre = rng.normal(size=(atoms, 3))
    frames = []
    for _ in range(steps):
        away = 0.9 * away + np.sqrt(1 - 0.9**2) * rng.normal(size=away.shape)
        centre = 0.99 * centre + np.sqrt(1 - 0.99**2) * rng.normal(size=centre.shape)
        positions = whole.positions + scale * (away + centre)
        frames.append(replicas(whole.numbers, positions, np.repeat(whole.cell.array[None], beads, axis=0)))
    return frames


def seconds(function: Callable, frames: list[Structures]) -> float:
    """Seconds per frame."""
    start = time.perf_counter()
    for frame in frames:
        function(frame)
    return (time.perf_counter() - start) / len(frames)


def list_times(atoms: int, rounds: int) -> dict[str, float]:
    """Microseconds per bead, and the median of the rounds' ratios; making the lists is counted."""
    frames = rings(atoms, 32, 60 if atoms <= 64 else 25)
    kept, fresh, slow = [], [], []
    Lists(5.0).edges(frames[0])
    for _ in range(rounds):
        lists = Lists(5.0)
        fresh.append(seconds(lambda s: fresh_edges(s, 5.0), frames))
        kept.append(seconds(lists.edges, frames))
        with patch.object(pairs, "library", lambda: None):  # as without a compiler
            slow.append(seconds(Lists(5.0).edges, frames))
    ratio = statistics.median(a / b for a, b in zip(fresh, kept, strict=True))
    micro = 1e6 / 32
    return {
        "kept_us": statistics.median(kept) * micro,
        "numpy_us": statistics.median(slow) * micro,
        "fresh_us": statistics.median(fresh) * micro,
        "ratio": ratio,
        "built": lists.built,
    }


def host_times(atoms: int, rounds: int) -> dict[str, float]:
    """Milliseconds to find the list of 32 beads, and to make one for one structure."""
    frames = rings(atoms, 32, 20)
    lists, find, make = Lists(5.0), [], []
    alone = frames[0][:1]
    for _ in range(rounds):
        lists.chosen(frames[0])
        find.append(seconds(lists.chosen, frames))
        make.append(seconds(lambda one: Lists(5.0).chosen(one), [alone] * 5))
    return {"find_ms": 1e3 * statistics.median(find), "make_ms": 1e3 * statistics.median(make)}


def share(potential: Allegro, atoms: int) -> float:
    """Part of the time of an evaluation that goes into lists and tensors."""
    frames = rings(atoms, 8, 12 if atoms <= 64 else 5)
    potential.evaluate(frames[0])
    before = dict(potential.spent)
    total = seconds(potential.evaluate, frames[1:]) * (len(frames) - 1)
    return sum(potential.spent[k] - before[k] for k in ("lists", "copies")) / total


def together(potential: Allegro, atoms: int, count: int) -> float:
    """Milliseconds per structure with so many of them in a call."""
    frames = rings(atoms, count, 10)
    one = Allegro(potential._model, potential.card, "cpu", "", most_edges=None if count == 1 else 10**9)
    for frame in frames[:2]:
        one.evaluate(frame)
    return 1e3 * min(seconds(one.evaluate, [frame]) for frame in frames) / count


def threads(potential: Allegro, count: int, duration: float) -> float:
    """Structures of 64 atoms per second, in so many threads of this process that share the model."""
    frames = rings(64, count, 1)[0]
    mine = [Allegro(potential._model, potential.card, "cpu", "") for _ in range(count)]

    def work(k: int) -> int:
        done, until = 0, time.perf_counter() + duration
        while time.perf_counter() < until:
            mine[k].evaluate(frames[k : k + 1])
            done += 1
        return done

    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(work, range(count))) / duration


def processes(count: int, duration: float) -> float:
    """The same in so many processes."""
    command = [sys.executable, __file__, "--alone", str(duration)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return sum(float(p.communicate(timeout=600)[0].split()[-1]) for p in running)


def main() -> None:
    """Measure, print, and write the figures where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures as a flat JSON object")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run with threads and processes")
    parser.add_argument("--alone", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_buffers()
    potential = load(MODEL)
    if options.alone:
        threads(potential, 1, 1.0)
        # All processes have loaded the model by the next full ten seconds.
        time.sleep(10 - time.time() % 10)
        print(threads(potential, 1, options.alone))
        return
    figures: dict[str, float] = {}
    for atoms in (64, 256):
        times = list_times(atoms, options.rounds)
        figures |= {f"lists.{atoms}.{name}": value for name, value in times.items()}
        figures[f"share.{atoms}"] = share(potential, atoms)
        print(
            f"{atoms} atoms, 32 beads: {times['kept_us']:.1f} us per bead from a kept list"
            f" ({times['numpy_us']:.1f} without a compiler),"
            f" {times['fresh_us']:.1f} from new ones ({times['ratio']:.1f}x);"
            f" lists and tensors are {100 * figures[f'share.{atoms}']:.2f} % of an evaluation"
        )
    for atoms in (64, 256, 1024):
        times = host_times(atoms, options.rounds)
        figures |= {f"host.{atoms}.{name}": value for name, value in times.items()}
        print(
            f"{atoms} atoms: {times['find_ms']:.3f} ms to find the list of 32 beads,"
            f" {times['make_ms']:.2f} ms to make the list of one structure"
        )
    for atoms in (16, 64, 256):
        row = {count: together(potential, atoms, count) for count in (1, 2, 4, 8)}
        figures |= {f"together.{atoms}.{count}": value for count, value in row.items()}
        print(f"{atoms} atoms, ms per structure: " + ", ".join(f"{n} a call {v:.2f}" for n, v in row.items()))
    for name, value in {
        "threads.1": threads(potential, 1, options.seconds),
        "threads.2": threads(potential, 2, options.seconds),
        "processes.2": processes(2, options.seconds),
    }.items():
        figures[name] = value
        print(f"{name}: {value:.1f} structures of 64 atoms per second")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
