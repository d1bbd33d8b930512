"""Start a program that is asked to stop when the process that started it is gone: ``leash.py PROGRAM ARGS``.

i-PI would wait for ever for forces from a door that was killed with kill -9. On Linux the kernel sends it
SIGTERM instead, and it writes RESTART.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; kept across exec


def main() -> None:
    """Tie this process to its parent, then become the program."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
