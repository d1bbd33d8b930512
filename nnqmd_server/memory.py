"""Keep large buffers: what is taken and freed at every step need not go back to the system in between."""

from __future__ import annotations

import ctypes
import sys

_KEPT = {-3: 1 << 30, -1: (1 << 31) - 1, -2: 1 << 26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_buffers() -> bool:
    """Tell glibc to keep freed memory for the next step; whether it could be told.

    A force set of 32 x 256 atoms is 200 kB each way. glibc takes such buffers from the system anew each
    time, which costs more in fresh pages than all copies of them (mallopt(3)).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all(mallopt(what, value) == 1 for what, value in _KEPT.items())
