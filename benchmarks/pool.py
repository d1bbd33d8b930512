"""What the pool costs, how it fills its workers, what it survives: python benchmarks/pool.py [--json FILE]

The workers of the first three parts are real worker processes whose potential sleeps a fixed time for each
structure (benchmarks/sleeping.py), so that eight of them fit on two cores.

overhead     one force set of 32 x 256 atoms after the other, by a client in a process of its own: what the
             client waits beyond the compute time of the slowest batch, as its worker measured it.
             Median [ms]; wanted: below 1.0 with 1, 2 and 8 workers. "floor" is the physical limit measured
             beside it: 300 bytes to one such sleeping process and back over two hops of bare unix sockets,
             with nothing looked at or decided.
efficiency   32 structures on 8 equal workers, and on one of speed 1 and one of speed 2: the speed-up as a
             share of the ideal; wanted: 0.95 and 0.90.
busy         real i-PI simulations of 32 x 256 atoms on 2 workers: the share of the time in which the workers
             compute, with 1 simulation (i-PI's own time shows) and with 4; wanted with 4: 0.95.
throughput   4 simulations of 8 x 64 atoms with the shipped Allegro model on one pool with one worker per
             core, against 4 pairs of i-PI and i-pi-driver-py with the same model in nequip's own ASE
             calculator, eager as it loads a package; steps per second of all together, in alternating
             rounds; wanted: 1.5 times. "compiled" is against pairs whose user has compiled the model too.
soak         requests from 4 clients at 4 workers, one of which is killed (SIGKILL) every 500 requests: how
             many got no answer, how many a wrong one, and by how much the pool's process grew; wanted: 0, 0,
             flat.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pool_simulations import busy, throughput
from pool_soak import soak
from pool_workers import efficiency, overhead

PARTS = ("overhead", "efficiency", "busy", "throughput", "soak")


def main() -> None:
    """Measure, print a table, and write the figures where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures as a flat JSON object")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput")
    parser.add_argument("--requests", type=int, default=100_000, help="of the soak")
    parser.add_argument("--minutes", type=float, default=0.0, help="the soak goes on for so long at least")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    parts = {
        "overhead": lambda: overhead(figures),
        "efficiency": lambda: efficiency(figures),
        "busy": lambda: busy(figures),
        "throughput": lambda: throughput(figures, options.rounds),
        "soak": lambda: soak(figures, options.requests, options.minutes),
    }
    for name in options.only:
        before = set(figures)
        parts[name]()
        for key in figures:
            if key not in before:
                print(f"{key:<32}{figures[key]:>12.4g}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
