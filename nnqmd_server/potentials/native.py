"""The compiled form of ``pairs.c``, made with the compiler that also compiles the models, and cached."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
from pathlib import Path

log = logging.getLogger("nnqmd.worker")

SOURCE = Path(__file__).with_name("pairs.c")

_INTEGER, _POINTER = ctypes.c_int64, ctypes.c_void_p


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of ``pairs.c``, or None where there is no compiler (numpy does the same, slower)."""
    try:
        from nnqmd_server.potentials.compiled import cache_folder, find_compiler

        compiler = find_compiler()
        if compiler is None:
            return None
        made = ctypes.CDLL(str(_made(compiler, cache_folder())))
        made.near_pairs.argtypes = [_INTEGER] * 3 + [_POINTER] * 4 + [ctypes.c_double] + [_POINTER] * 2
        made.near_pairs.restype = None
        made.take_edges.argtypes = [_INTEGER] * 2 + [_POINTER] * 11
        made.take_edges.restype = None
    except (ImportError, OSError, AttributeError, subprocess.SubprocessError) as error:
        log.info("neighbour lists are cut with numpy: %s", error)
        return None
    return made


def _flags() -> list[str]:
    import torch  # knows what this processor can do

    # No fused multiply-add: numpy has none, and both must agree to the last bit.
    flags = ["-O3", "-ffp-contract=off", "-fPIC", "-shared"]
    wide = torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
    return [*flags, "-mavx2"] if wide and platform.machine() in {"x86_64", "AMD64"} else flags


def _made(compiler: str, folder: Path) -> Path:
    flags = _flags()
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([platform.machine(), *flags]).encode()).hexdigest()
    target = folder / f"pairs-{key[:16]}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"draft-{os.getpid()}-{target.name}"
        command = [compiler, "-x", "c", "-std=c11", *flags, str(SOURCE), "-o", str(draft)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    return target
