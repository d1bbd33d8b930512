"""What forces cost beside the bare model, and beside its peers: python benchmarks/evaluate.py [--json FILE]

The structures are force sets of real i-PI runs (thermostatted ring-polymer dynamics of solid ammonia, the
shipped model) that this program records first. Rounds alternate between the sides; figures are medians over
the rounds, with the range over them. It fails when the forces of two sides differ.

served   8 beads of 64 and of 256 atoms on W workers. bare: W processes with a worker's environment that call
         the AOTInductor model, bead by bead, on tensors that were made before; served: a client in a process
         of its own asks the pool for the same force sets. served_over_bare.N is the ratio of the times per
         force set; wanted: at most 1.05. The bare processes do five force sets on their own; in
         served_over_in_step.N they wait for each other after every force set, as they must in a simulation:
         where cores are not equally fast at every moment, that takes longer. list_share.N is the share of
         list building and preparation in a worker's evaluation (its potential, in the bare processes);
         wanted: below 0.02. beyond_model_share.N is that of all but the model: also copies, dipoles, results.
driver   i-PI's own time per step with `nnqmd run`'s pool and direct door, against W clients of i-PI's own
         ASE driver (i-pi-driver-py, ipi/pes/_ase.py) with NequIPCalculator, eager, on the same cores.
         speedup_vs_ase_driver.N; wanted: at least 1.8.
lists    32 beads of 64 atoms: one neighbour list per bead and step against the lists that are kept.
         ring_list_speedup.p32; wanted: at least 10.
gpu      Only where there is a GPU. gpu.batch_speedup.N: 32 beads of 64, 256 and 1024 atoms (.1000) in one
         call against one by one; wanted at 64: at least 5. gpu.host_share.N: what is not the model in the
         batched call; wanted: at most 0.1. gpu.speedup_vs_ase_clients.N: as `driver`, against 8 clients on
         the same GPU. gpu.busy.256: share of the time in which the GPU computes (nvidia-smi) while two
         simulations of 32 beads run; wanted: at least 0.9.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from evaluate_driver import driver
from evaluate_gpu import gpu
from evaluate_inputs import Figures
from evaluate_lists import ring_lists
from evaluate_served import served

PARTS = ("served", "driver", "lists", "gpu")
WANTED = {
    "served_over_bare": "at most 1.05",
    "list_share": "below 0.02",
    "speedup_vs_ase_driver": "at least 1.8",
    "ring_list_speedup": "at least 10",
    "gpu.batch_speedup.64": "at least 5",
    "gpu.host_share": "at most 0.1",
    "gpu.busy": "at least 0.9",
}


def table(figures: Figures) -> None:
    """What was measured, with ranges and what was wanted."""
    for name, value in figures.items():
        if name.endswith((".min", ".max")):
            continue
        words = ""
        if f"{name}.min" in figures:
            words = f"   ({figures[f'{name}.min']:.4g} to {figures[f'{name}.max']:.4g})"
            words += "".join(f"; wanted: {text}" for key, text in WANTED.items() if name.startswith(key))
        print(f"{name:<36}{value:>10.4g}{words}")


def main() -> None:
    """Measure, print a table, and write the figures where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures as a flat JSON object")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="one per core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", choices=(64, 256), default=(64, 256), help="atoms")
    options = parser.parse_args()
    from nnqmd_server.pool.processes import count_gpus

    figures: Figures = {}
    parts = {
        "served": lambda folder: served(figures, folder, options.workers, options.rounds, options.sizes),
        "driver": lambda folder: driver(figures, folder, options.workers, options.rounds, options.sizes),
        "lists": lambda folder: ring_lists(figures, folder, options.workers, options.rounds),
        "gpu": lambda folder: gpu(figures, folder, options.rounds),
    }
    without = "gpu" in options.only and not count_gpus()
    for name in options.only:
        if name == "gpu" and without:
            continue
        with tempfile.TemporaryDirectory(prefix="nnqmd-bench-") as place:
            parts[name](Path(place))
    print(f"\nsolid ammonia, {options.workers} workers, medians of {options.rounds} rounds (range)")
    table(figures)
    if without:
        print("gpu.*                               no GPU: not measured")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
