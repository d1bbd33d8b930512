"""Frames in even blocks at even times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.readers.source import Array, Frames, Source


def has_cell(source: Source) -> bool:
    """Whether the first frame names a cell."""
    return next(source.frames(1, None)).cells is not None


def interval_of(source: Source, timestep: float | None, interval: float | None) -> float:
    """Time between frames [fs]: what the file, the time step and the caller say must be one number."""
    for name, value in (("timestep", timestep), ("interval", interval)):
        if value is not None and not 0 < value < 1e9:
            raise DataError(f"A {name} of {value:g} fs makes no sense.", "Give a positive time in fs.")
    found = [] if source.interval is None else [("the file", source.interval)]
    if source.has_steps and timestep is not None:
        found.append((f"a time step of {timestep:g} fs", timestep * _stride(source)))
    if interval is not None:
        found.append((f"interval={interval:g}", interval))
    if not found:
        raise DataError(
            f"{source.path} does not say how much time lies between its frames.",
            "Give the time step of the simulation in fs with timestep= (--timestep)."
            if source.has_steps
            else "Give the time between frames in fs with interval= (--interval).",
        )
    for who, value in found[1:]:
        if abs(value - found[0][1]) > 1e-6 * found[0][1]:
            raise DataError(
                f"The time between the frames of {source.path} is {found[0][1]:g} fs by {found[0][0]}, "
                f"but {value:g} fs by {who}.",
                "Give only one of timestep= (--timestep) and interval= (--interval), the right one.",
            )
    if not found[0][1] > 0:
        raise DataError(f"The frames of {source.path} are not in order of time.", "Sort or cut the file.")
    return float(found[0][1])


def _stride(source: Source) -> int:
    steps: list[int] = []
    for frames in source.frames(2, None):
        steps.extend(int(s) for s in frames.steps)
        if len(steps) > 1:
            if steps[1] <= steps[0]:
                raise _uneven(source.path, 0, steps[0], steps[1], steps[1] - steps[0])
            return steps[1] - steps[0]
    raise DataError(
        f"{source.path} holds one frame only, from which no interval follows.",
        "Run longer, or write the trajectory more often (smaller stride).",
    )


def _uneven(path: Path, frame: int, before: int, after: int, stride: int) -> DataError:
    return DataError(
        f"The steps in {path} are not even: frame {frame} at step {before} is followed by step {after}, "
        f"but the run began with a stride of {stride}.",
        "A continued run repeats or omits steps: cut the file to one even stretch.",
    )


def even(source: Source, frames: Iterator[Frames]) -> Iterator[Frames]:
    """The same frames, whose steps are checked to be even."""
    stride = last = None
    count = 0
    for part in frames:
        steps = part.steps if last is None else np.concatenate([[last], part.steps])
        strides = np.diff(steps)
        if len(strides):
            stride = int(strides[0]) if stride is None else stride
            odd = np.flatnonzero(strides != stride)
            if len(odd) or stride < 1:
                k = int(odd[0]) if len(odd) else 0
                raise _uneven(
                    source.path, count + k - (last is not None), int(steps[k]), int(steps[k + 1]), stride
                )
        count += len(part.steps)
        last = part.steps[-1]
        yield part


def regrouped(source: Source, size: int, atoms: Array | None) -> Iterator[Frames]:
    """Frames in groups of exactly ``size``, but for the last."""
    waiting: list[Frames] = []
    have = 0
    for part in source.frames(size, atoms):
        if have == 0 and len(part.steps) == size:
            yield part
            continue
        waiting.append(part)
        have += len(part.steps)
        while have >= size:
            joined = _join(waiting)
            yield part_of(joined, 0, size)
            have -= size
            waiting = [part_of(joined, size, size + have)] if have else []
    if have:
        yield _join(waiting)


def _join(parts: Sequence[Frames]) -> Frames:
    cells = None if parts[0].cells is None else np.concatenate([p.cells for p in parts])
    values = np.concatenate([p.values for p in parts])
    return Frames(values, np.concatenate([p.steps for p in parts]), cells, parts[-1].done)


def part_of(part: Frames, start: int, stop: int) -> Frames:
    """Some of the frames."""
    cells = None if part.cells is None else part.cells[start:stop]
    return Frames(part.values[start:stop], part.steps[start:stop], cells, part.done)
