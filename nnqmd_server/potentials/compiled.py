"""The compiled form of a package or checkpoint, made on the machine that runs it and kept in a cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from nnqmd_server.potentials.base import Card
from nnqmd_server.potentials.package import form_of, read_card

COMPILE_TIMEOUT = 1200.0
"""Longest wait for one compilation [s]."""


def cache_folder() -> Path:
    """Where compiled models are kept: ``$NNQMD_CACHE`` or ``~/.cache/nnqmd``."""
    base = (
        os.environ.get("NNQMD_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nnqmd"
    )
    return Path(base)


def find_compiler() -> str | None:
    """The C++ compiler that the model would be compiled with, or None."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def _hardware(device: str) -> str:
    # AOTInductor code is bound to the instruction set or the GPU architecture that it was made on.
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"cuda{major}{minor}"
    return f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"


def _key(path: Path, card: Card, device: str) -> str:
    """Everything that decides what comes out of the compiler."""
    parts = [card.sha256[:16], f"torch{torch.__version__.split('+')[0]}", _hardware(device)]
    if card.dtype != read_card(path).dtype:
        parts.append(card.dtype)
    if form_of(path) == "checkpoint":  # a package brings its own
        parts.append(f"nequip{version('nequip')}-allegro{version('nequip-allegro')}")
    if device == "cuda":  # an installed tensor product is compiled in
        parts += [name for name in ("cuequivariance_torch", "triton") if find_spec(name)]
    return "-".join(parts)


def compiled_model(path: Path, card: Card, device: str) -> tuple[Path | None, str]:
    """Compile a package or checkpoint for this machine, or find it compiled already.

    Parameters
    ----------
    path : Path
        The file.
    card : Card
        Its card, with the precision that is wanted.
    device : str
        "cpu" or "cuda".

    Returns
    -------
    file : Path or None
        The compiled model; None when it has to run eagerly.
    reason : str
        One line for the log.
    """
    compiler = find_compiler()
    if compiler is None:
        return None, "eager: no C++ compiler was found (install g++ to make it about twice as fast)"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return None, f"eager: the cache folder cannot be made ({error}); set NNQMD_CACHE to a writable one"
    key = _key(path, card, device)
    target = folder / f"{key}.nequip.pt2"
    if target.is_file():
        return target, f"compiled for {device} (cached)"
    try:
        # All workers of a machine start at once; the first compiles, the others wait for it.
        with FileLock(folder / f"{key}.lock", timeout=COMPILE_TIMEOUT):
            if target.is_file():
                return target, f"compiled for {device} (cached)"
            return _compile(path, card, device, target)
    except Timeout:
        return None, f"eager: another process has been compiling {card.name} for {COMPILE_TIMEOUT:.0f} s"
    except OSError as error:
        return None, f"eager: the cache folder {folder} cannot be used ({error}); set NNQMD_CACHE to another"


def _compile(path: Path, card: Card, device: str, target: Path) -> tuple[Path | None, str]:
    log = target.with_name(target.name.replace(".nequip.pt2", ".log"))
    draft = target.with_name(f"draft-{os.getpid()}-{target.name}")
    command = [sys.executable, "-m", "nnqmd_server.potentials.aot", str(path), str(draft)]
    command += ["--device", device, "--precision", card.dtype]
    # The number of threads is compiled in; the workers of a machine share its cores with one each.
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    log.unlink(missing_ok=True)
    # On a GPU the first try is with the fastest tensor product that is installed.
    for more, what in (([], ""), (["--plain"], ", with nequip's own tensor product")):
        try:
            with log.open("a") as output:
                subprocess.run(
                    command + more,
                    env=settings,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=COMPILE_TIMEOUT,
                    check=True,
                )
            draft.replace(target)
        except (OSError, subprocess.SubprocessError) as error:
            draft.unlink(missing_ok=True)
            failure = error
            if device == "cpu":
                break
        else:
            return target, f"compiled for {device}{what}"
    return None, f"eager: compilation failed ({failure.__class__.__name__}; see {log})"
