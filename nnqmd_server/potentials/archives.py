"""Zip files of models: opened with errors in words, their texts, and their pickles as plain data.

Nothing in them is executed, and nothing is imported for them.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

from nnqmd_server.errors import ModelError

WANTED = (
    "Give a packaged model (.nequip.zip), as `nnqmd train` or `nequip-package build` writes it, a checkpoint"
    " (.ckpt), a compiled model (.nequip.pt2), or one deployed by nequip 0.5 or 0.6 (.pth)."
)

_MAX_TEXT = 1 << 20
_MAX_PICKLE = 1 << 26

PLAIN = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    *(
        f"torch.{kind}Storage"
        for kind in (
            *("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"),
            "Untyped",
        )
    ),
}
"""What the pickle of a checkpoint may name: tensors, numbers, texts and containers of them."""


class opened:  # noqa: N801 - used like a function
    """A zip file whose errors are told in words.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    ModelError
        The file is missing, is no zip file, or what is read from it inside of the block cannot be.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelError(f"There is no model file {path}.", WANTED)
        self._path = path

    def __enter__(self) -> zipfile.ZipFile:
        try:
            self._archive = zipfile.ZipFile(self._path)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise self._told(error) from error
        return self._archive

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._archive.close()
        if error is not None and not isinstance(error, ModelError) and isinstance(error, _UNREADABLE):
            raise self._told(error) from error

    def _told(self, error: BaseException) -> ModelError:
        with self._path.open("rb") as file:
            head = file.read(2)
        if head[:1] == b"\x80":
            return ModelError(
                f"{self._path} is a pickle, which could execute anything when it is read; it was not read.",
                WANTED,
            )
        return ModelError(f"{self._path} is not a model: {error}.", WANTED)


_UNREADABLE = (
    OSError,
    EOFError,
    UnicodeDecodeError,
    NotImplementedError,
    RecursionError,
    RuntimeError,  # an encrypted member
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    json.JSONDecodeError,
)


def text_of(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member that should be a text of moderate length.

    Raises
    ------
    BadZipFile
        It is too long.
    """
    if archive.getinfo(name).file_size > _MAX_TEXT:
        raise zipfile.BadZipFile(f"its {name} is too long")
    return archive.read(name)


class _Blank:
    """Stands where a tensor was."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _Reader(pickle.Unpickler):
    """Reads plain containers; what else a pickle names becomes a blank: nothing is imported or called."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.named: set[str] = set()

    def find_class(self, module: str, name: str) -> type:
        self.named.add(f"{module}.{name}")
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Blank

    def persistent_load(self, pid: object) -> _Blank:
        # The kind of a storage stands in its identity.
        return _Blank()


def _read_pickle(path: Path, archive: zipfile.ZipFile) -> tuple[Any, set[str]]:
    name = next(n for n in archive.namelist() if n.partition("/")[2] == "data.pkl")
    if archive.getinfo(name).file_size > _MAX_PICKLE:
        raise ModelError(f"{path} is not a checkpoint: its pickle is too long.", WANTED)
    reader = _Reader(io.BytesIO(archive.read(name)))
    try:
        return reader.load(), reader.named
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, MemoryError) as error:
        if reader.named - PLAIN:  # a blank cannot do what the named thing can
            return None, reader.named
        raise pickle.UnpicklingError(f"its pickle cannot be read ({error})") from error


def names_in(path: Path, archive: zipfile.ZipFile) -> set[str]:
    """What the pickle of a file that ``torch.save`` made would import when it is loaded."""
    return _read_pickle(path, archive)[1]


def plain_data(path: Path, archive: zipfile.ZipFile) -> Any:
    """Its containers, numbers and texts, with a blank where anything else was."""
    return _read_pickle(path, archive)[0]
