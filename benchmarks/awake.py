"""Keep the processors from going to sleep while something is measured that waits a lot.

A processor of a virtual machine that has nothing to do is given away, and is slow for a while when it is
given back: a message waits for that at every hop. In a real simulation a model computes meanwhile. Here a
loop on every core does, which the system runs only when nobody else wants the core (SCHED_IDLE, Linux).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LOOP = """
import os, sys
parent = int(sys.argv[2])
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    pass
"""


@contextmanager
def awake(wanted: bool = True) -> Iterator[None]:
    """Within this, no core that we may use sleeps; if ``wanted`` is false it does nothing."""
    cores = sorted(os.sched_getaffinity(0)) if wanted else []
    loops = [subprocess.Popen([sys.executable, "-c", _LOOP, str(core), str(os.getpid())]) for core in cores]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
