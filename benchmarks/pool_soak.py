"""Many requests while workers are killed, for benchmarks/pool.py."""

from __future__ import annotations

import multiprocessing
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from pool_workers import HERE, Workers, beads

KILL_EVERY = 500


def _serve(doors: str, back: str, stop: object) -> None:
    from nnqmd_server.pool.scheduler import Pool

    pool = Pool(doors, back)
    pool.start()
    stop.wait()
    print(f"the pool: {pool.status().lost_workers} workers lost, {pool.status().retries} batches given again")
    pool.stop()


def _hammer(address: str, seed: int, count: int, end: float, asked: object, bad: object) -> None:
    """A client that checks every answer, for so many requests and until a time."""
    sys.path.insert(0, str(HERE))
    from sleeping import expected

    from nnqmd_server.errors import PoolError
    from nnqmd_server.pool.client import PoolClient

    client = PoolClient(address, patience=60.0)
    client.card()
    rng = np.random.default_rng(seed)
    sizes = [(4, 16), (8, 16), (2, 64), (16, 8)]
    sets = [beads(n, atoms, seed) for n, atoms in sizes]
    while asked[seed] < count or time.time() < end:
        structures = sets[rng.integers(len(sets))]
        structures.positions[:] += rng.normal(scale=0.01)
        try:
            results = client.submit(structures)
        except PoolError as error:
            print(f"lost: {error}")
            bad[0] += 1
        else:
            right = expected(structures)
            same = np.array_equal(results.forces, right.forces) and np.array_equal(
                results.energy, right.energy
            )
            bad[1] += not same
        asked[seed] += 1
    client.close()


def _memory(pid: int) -> float:
    """Resident memory of a process [MB]."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def soak(figures: dict[str, float], requests: int, minutes: float) -> None:
    """Many requests while workers are killed."""
    context = multiprocessing.get_context("spawn")
    clients = 4
    each = requests // clients
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        doors, back = f"ipc://{name}/doors", f"ipc://{name}/workers"
        stop = context.Event()
        pool = context.Process(target=_serve, args=(doors, back, stop))
        pool.start()
        workers = Workers(back, Path(name))
        present = [workers.start(0.0) for _ in range(4)]
        asked = context.Array("q", clients)
        bad = [context.Array("q", 2) for _ in range(clients)]
        end = time.time() + 60 * minutes
        askers = [
            context.Process(target=_hammer, args=(doors, k, each, end, asked, bad[k])) for k in range(clients)
        ]
        for one in askers:
            one.start()
        started, kills, resident = time.monotonic(), 0, []
        while any(one.is_alive() for one in askers):
            time.sleep(0.01)
            if sum(asked) >= (kills + 1) * KILL_EVERY:
                kills += 1
                place = rng.randrange(len(present))
                present[place].kill()
                present[place].wait()
                present[place] = workers.start(0.0)
                resident.append((sum(asked), _memory(pool.pid)))
            if time.monotonic() - started > 3600:
                raise SystemExit("the soak does not end")
        spent = time.monotonic() - started
        stop.set()
        pool.join(20)
        workers.end()
    settled = next(m for n, m in resident if n >= 0.1 * sum(asked))
    figures["soak.requests"] = sum(asked)
    figures["soak.kills"] = kills
    figures["soak.seconds"] = spent
    # A client that ended early, by a crash, has not asked what it should have.
    short = sum(max(0, each - count) for count in asked)
    figures["soak.lost"] = short + sum(counts[0] for counts in bad)
    figures["soak.wrong"] = sum(counts[1] for counts in bad)
    figures["soak.rss_mb"] = resident[-1][1]
    figures["soak.rss_growth_mb"] = resident[-1][1] - settled
