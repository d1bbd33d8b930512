"""Run a Python program that is asked to stop when the process that started it is gone.

    python -m nnqmd_server.inputs.leash PROGRAM ARGUMENTS

i-PI would wait for ever for forces from a door that was killed with kill -9. Here it gets SIGTERM instead,
upon which it writes RESTART. (The kernel can send a signal when a parent dies, but may send it once for
every thread of the parent, and i-PI takes a second SIGTERM for an order to drop everything.)
"""

import os
import runpy
import signal
import sys
import threading
import time

INTERVAL = 0.3
"""How often the parent is looked for [s]."""


def watch(parent: int) -> None:
    """Ask this process to stop when its parent is another one than it was."""
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Tie this process to its parent, then run the program in it."""
    threading.Thread(target=watch, args=(os.getppid(),), name="nnqmd-leash", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
