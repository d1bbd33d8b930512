"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnqmd_server.errors import OutputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes ``path`` when all went well.

    The old file, if there is one, stays until then; after an error or Ctrl-C nothing partial is left.

    Raises
    ------
    OutputError
        The folder or the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error}).",
            "Choose another directory with --out, or make room on the disk.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; an error in words when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made ({error}).", "Choose another directory with --out."
        ) from error
