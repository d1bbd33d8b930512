"""PDB files as i-PI writes them: positions, with the step and the units in the title."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import numpy as np
from ase.geometry import cellpar_to_cell

from nnqmd_server.spectra.readers.source import (
    Array,
    Frames,
    Source,
    cut_frame,
    empty_file,
    not_a_frame,
    other_contents,
)

_STEP = re.compile(r"Step:\s*(\d+)")
_QUANTITY = re.compile(r"(\w+)\{([^}]*)\}")


def open_pdb(path: Path, drop_cut: bool = False) -> Source:
    """Open a PDB trajectory. Without a title that says otherwise, the format itself means Angstrom."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        lines = _lines(stream)
    if not lines:
        raise empty_file(path)
    if not _whole(lines):
        raise empty_file(path, "its first frame is cut off") if drop_cut else cut_frame(path, 0)
    step, said, cell, symbols, _ = _parse(lines, path, 0)
    units = dict(said)
    named = [(q, u) for q, u in said if q != "cell"]
    quantity, unit = named[0] if named else ("positions", "angstrom")
    warnings: list[str] = []
    frames = partial(_frames, path, symbols, said, cell is not None, drop_cut, warnings)
    return Source(
        path,
        symbols,
        quantity,
        unit,
        units.get("cell", "angstrom"),
        frames,
        step is not None,
        warnings,
        about=round(path.stat().st_size / sum(map(len, lines))),
        digits=6,
    )


def _lines(stream: TextIO) -> list[str]:
    lines = []
    for line in stream:
        if line.strip():
            lines.append(line)
        if line.startswith("END"):
            break
    return lines


def _whole(lines: list[str]) -> bool:
    return lines[-1].startswith("END") and lines[-1].endswith("\n")


def _parse(
    lines: list[str], path: Path, frame: int
) -> tuple[int | None, tuple[tuple[str, str], ...], Array | None, tuple[str, ...], Array]:
    title = "".join(line for line in lines if line.startswith("TITLE"))
    step = _STEP.search(title)
    try:
        box = [line for line in lines if line.startswith("CRYST1")]
        edges = (6, 15, 24, 33, 40, 47, 54)
        cell = None
        if box:
            numbers = [float(box[0][a:b]) for a, b in pairwise(edges)]
            cell = cellpar_to_cell(numbers)
        atoms = [line for line in lines if line.startswith(("ATOM", "HETATM"))]
        symbols = tuple(line[12:16].strip() for line in atoms)
        # columns 31 to 54 of the format, three of eight characters
        values = np.array([[float(line[k : k + 8]) for k in (30, 38, 46)] for line in atoms])
    except ValueError as error:
        raise not_a_frame(path, frame, "a PDB", str(error)) from error
    if not atoms:
        raise not_a_frame(path, frame, "a PDB", "no ATOM lines")
    return int(step[1]) if step else None, tuple(_QUANTITY.findall(title)), cell, symbols, values


def _frames(
    path: Path,
    symbols: tuple[str, ...],
    said: tuple[tuple[str, str], ...],
    has_cell: bool,
    drop_cut: bool,
    warnings: list[str],
    n: int,
    atoms: Array | None,
) -> Iterator[Frames]:
    size = max(1, path.stat().st_size)
    count = read = 0
    with path.open(encoding="utf-8", errors="replace") as stream:
        while lines := _lines(stream):
            read += sum(map(len, lines))
            if not _whole(lines):
                if not drop_cut:
                    raise cut_frame(path, count)
                warnings.append(f"the last frame of {path.name} is cut off and was left out")
                return
            step, now, cell, labels, values = _parse(lines, path, count)
            if labels != symbols or now != said or (cell is not None) != has_cell:
                raise other_contents(
                    path, count, f"{len(labels)} atoms, {now}", f"{len(symbols)} atoms, {said}, by label"
                )
            yield Frames(
                (values if atoms is None else values[atoms])[None, None],
                np.array([count if step is None else step], dtype=np.int64),
                None if cell is None else cell[None],
                read / size,
            )
            count += 1
