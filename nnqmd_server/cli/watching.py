"""What ``nnqmd serve`` may keep beside the pool: metrics and a page, a log, a recording."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnqmd_server.cli.terminal import console

if TYPE_CHECKING:
    from nnqmd_server.pool.launch import LocalPool


@dataclass(frozen=True)
class WatchOptions:
    """What is wanted: a port for metrics and page, a JSON-lines log, a recording."""

    metrics_port: int | None = None
    log_json: Path | None = None
    log_all: bool = False
    record: Path | None = None
    record_mb: int = 1024

    def __bool__(self) -> bool:
        return self.metrics_port is not None or self.log_json is not None or self.record is not None


@contextlib.contextmanager
def watching(pool: LocalPool, options: WatchOptions) -> Iterator[None]:
    """Keep what is wanted while the pool serves."""
    with contextlib.ExitStack() as stack:
        if options.log_json is not None:
            from nnqmd_server.pool.json_log import JsonLog

            stack.enter_context(contextlib.closing(JsonLog(options.log_json, pool.watch, options.log_all)))
        if options.record is not None:
            stack.enter_context(_recording(pool, options.record, options.record_mb))
        if options.metrics_port is not None:
            from nnqmd_server.pool.web import Web

            web = Web(options.metrics_port, pool.watch, lambda: asdict(pool.status()))
            stack.enter_context(contextlib.closing(web))
            console.print(f"page at [bold]{web.url}[/], metrics at {web.url}metrics")
        yield


@contextlib.contextmanager
def _recording(pool: LocalPool, path: Path, megabytes: int) -> Iterator[None]:
    from nnqmd_server.pool.recording import Recorder

    recorder = Recorder(path, lambda: pool.status().cards, megabytes * 1_000_000)
    pool.record(recorder)
    try:
        yield
    finally:
        pool.record(None)
        recorder.close()
        words = f"{recorder.written} force sets are in {path}"
        if recorder.left_out:
            why = "the file had its largest size" if not recorder.trouble else recorder.trouble
            words += f"; {recorder.left_out} were left out ({why if recorder.full else 'the disk was slow'})"
        console.print(words)
