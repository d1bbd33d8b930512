"""Run i-PI so that it stops softly when the process that started it is gone, however often it is told to.

    python -m nnqmd_server.inputs.leash PROGRAM ARGUMENTS

i-PI would wait for ever for forces from a door that was killed with kill -9. Here it gets SIGTERM instead,
upon which it writes RESTART. i-PI takes a second SIGTERM for an order to drop everything, and it may well
get one: from a batch system that signals every process of a job, from `nnqmd run`, and from here. It leaves
a second one to the handler that it found when it began: to ours, which does nothing then.
"""

import os
import runpy
import signal
import sys
import threading
import time
from types import FrameType

INTERVAL = 0.3
"""How often the parent is looked for [s]."""


def watch(parent: int) -> None:
    """Ask this process to stop when its parent is another one than it was."""
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)


def once(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM: as ever until i-PI has a handler of its own, and a second one not at all."""
    if signal.getsignal(signal.SIGTERM) is once:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Tie this process to its parent, then run the program in it."""
    signal.signal(signal.SIGTERM, once)
    threading.Thread(target=watch, args=(os.getppid(),), name="nnqmd-leash", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
