"""The pool's log for programs: one JSON object a line. docs/operating.md says what each line means."""

from __future__ import annotations

import json
import queue
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nnqmd_server.errors import OutputError
from nnqmd_server.pool.watch import EACH_FORCE_SET, Watch

SUMMARY = 60.0
"""How often a line sums up [s]."""

MAX_BYTES = 100_000_000
"""A log that grows past this is renamed to ``FILE.1``, and a new one is begun."""

MAX_LINES = 10_000
"""Lines that may wait for the disk; more are left out and counted."""


class JsonLog:
    """Writes what a :class:`Watch` is told, in a thread of its own: a slow disk never delays a force set.

    Parameters
    ----------
    path : Path
        The file; new lines are added to one that is there.
    watch : Watch
        The pool's.
    everything : bool
        Also a line for every force set and batch, not only what is out of the ordinary.
    every : float
        How often a line sums up [s].
    max_bytes : int
        Largest size of the file.

    Raises
    ------
    OutputError
        The file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        watch: Watch,
        everything: bool = False,
        every: float = SUMMARY,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._watch = watch
        self._everything = everything
        self._every = every
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"Cannot write the log {path}: {error}.", "Choose another --log-json."
            ) from error
        self._path, self._bytes, self._max_bytes = path, path.stat().st_size, max_bytes
        self._lines: queue.Queue[tuple | None] = queue.Queue(MAX_LINES)
        self._left_out = 0
        self.trouble = ""
        self._thread = threading.Thread(target=self._write_all, name="nnqmd-log", daemon=True)
        self._thread.start()
        self.tell("opened", {})
        watch.listen(self.tell)

    def tell(self, what: str, fields: dict[str, Any]) -> None:
        """Something has happened; returns at once."""
        if what in EACH_FORCE_SET and not self._everything:
            return
        try:
            self._lines.put_nowait((time.time(), what, fields))
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Write what is still waiting, and end."""
        self._watch.ignore(self.tell)
        self.tell("summary", self._summary())
        self.tell("closed", {})
        try:
            self._lines.put(None, timeout=5)
        except queue.Full:
            return
        self._thread.join(10)

    def _summary(self) -> dict[str, Any]:
        workers = self._watch.workers().values()
        simulations = self._watch.simulations()
        busy = sum(one["busy_share"] for one in workers) / max(1, len(workers))
        return {
            "force_sets": self._watch.force_sets,
            "structures": self._watch.structures,
            "workers": len(workers),
            "busy_share": round(busy, 4),
            "simulations": len(simulations),
            "force_sets_per_second": round(sum(one["force_sets_per_second"] for one in simulations), 3),
        }

    def _write_all(self) -> None:
        due = time.monotonic() + self._every
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                line = ()
            if line is None:
                break
            if line:
                self._write(*line)
            if self._left_out and self._lines.empty():
                lost, self._left_out = self._left_out, 0
                self._write(time.time(), "left_out", {"lines": lost})
            if time.monotonic() >= due:
                due = time.monotonic() + self._every
                self._write(time.time(), "summary", self._summary())
        self._file.close()

    def _write(self, when: float, what: str, fields: dict[str, Any]) -> None:
        stamp = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
        text = json.dumps({"time": stamp, "event": what, **fields}) + "\n"
        try:
            if self._bytes and self._bytes + len(text) > self._max_bytes:
                self._file.close()
                self._path.replace(f"{self._path}.1")
                self._file = self._path.open("a", encoding="utf-8")
                self._bytes = 0
            self._file.write(text)
            self._file.flush()
            self._bytes += len(text)
        except (OSError, ValueError) as error:  # a full disk stops no simulation
            self.trouble = str(error)
