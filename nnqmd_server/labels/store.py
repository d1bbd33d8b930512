"""What has been labelled already: one small file per frame, named after everything its labels depend on.

A killed run loses nothing but the frames that were being computed; several runs may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms
from ase.io import read

from nnqmd_server.errors import DataError, OutputError
from nnqmd_server.labels.frames import write_frames


@dataclass(frozen=True)
class Store:
    """A folder of labelled frames and of failures."""

    folder: Path

    def make(self) -> None:
        """Make the folders.

        Raises
        ------
        OutputError
            They cannot be made.
        """
        for name in ("frames", "failed", "running"):
            try:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{self.folder} cannot be made ({error.strerror}).", "Choose another --out."
                ) from error

    def has(self, key: str) -> bool:
        """Whether this frame is labelled."""
        return self._frame(key).is_file()

    def put(self, key: str, frame: Atoms) -> None:
        """Keep a labelled frame, whole or not at all."""
        write_frames(self._frame(key), [frame])
        self._failure(key).unlink(missing_ok=True)

    def get(self, key: str) -> Atoms:
        """A labelled frame.

        Raises
        ------
        DataError
            Its file was damaged.
        """
        path = self._frame(key)
        try:
            return read(path, 0, format="extxyz", parallel=False)
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise DataError(
                f"{path} cannot be read: {error}.", "Remove it: the frame will be labelled again."
            ) from error

    def fail(self, key: str, reason: str) -> None:
        """Note why a frame could not be labelled."""
        part = self._failure(key).with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"reason": reason}))
        part.replace(self._failure(key))

    def reason(self, key: str) -> str | None:
        """Why a frame could not be labelled, or None."""
        try:
            return str(json.loads(self._failure(key).read_text())["reason"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError):
            return "unknown: the note about it is damaged"

    def forget(self, key: str) -> None:
        """Try a frame again."""
        self._failure(key).unlink(missing_ok=True)

    def running(self, key: str) -> Path:
        """Where a frame is computed."""
        return self.folder / "running" / key

    def failed_folder(self, key: str) -> Path:
        """Where the files of a failed frame are kept."""
        return self.folder / "failed" / key

    def _frame(self, key: str) -> Path:
        return self.folder / "frames" / f"{key}.xyz"

    def _failure(self, key: str) -> Path:
        return self.folder / "failed" / f"{key}.json"


def key_of(identity: str) -> str:
    """A name for everything that labels depend on: SHA-256, shortened to 24 digits."""
    return hashlib.sha256(identity.encode()).hexdigest()[:24]
