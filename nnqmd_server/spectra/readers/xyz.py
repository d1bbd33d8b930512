"""xyz files: i-PI's own (``format='xyz'``), extended xyz (i-PI's ``format='ase'``, ASE), and plain ones.

i-PI's comment line names the step, the cell, the quantity and the units. Rows as i-PI writes them have a
fixed width, so whole blocks of frames are read as one array; anything else is read word by word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from ase.geometry import cellpar_to_cell

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.readers.numbers import fixed_numbers, words_to_table
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
_QUANTITY = re.compile(r"(?<![\w{])(\w+)\{([^}]*)\}")
_CELL = re.compile(r"CELL[(\[{](abcABC|H|GENH)[)\]}]:((?:\s+[-+.\deE]+)+)")
_LABEL, _ROW = 8, 48  # characters of i-PI's "%8s %12.5e %12.5e %12.5e\n"
_STARTS = (9, 22, 35)
_PIECE = 1 << 20  # bytes of text read at once: what the processor's cache holds


@dataclass(frozen=True)
class Comment:
    """What a comment line says; "" or None where it says nothing."""

    step: int | None
    quantity: str
    unit: str
    cell: tuple[tuple[float, ...], ...] | None
    cell_unit: str
    columns: tuple[int, ...] = (1, 2, 3)
    label: int = 0


def open_xyz(path: Path, quantity: str = "", drop_cut: bool = False) -> Source:
    """Open an xyz file; ``quantity`` chooses among several columns of an extended one."""
    with path.open("rb") as stream:
        lines = _frame_lines(stream, path, 0)
        if not lines:
            raise empty_file(path)
        if not _is_whole(lines):
            raise empty_file(path, "its first frame is cut off") if drop_cut else cut_frame(path, 0)
        comment = read_comment(lines[1], path, 0, quantity)
        _, words, _ = _table(lines, comment, path, 0)
        fixed = all(len(line) == _ROW and line[17] == "e" for line in lines[2:])
    width = len(words) // (len(lines) - 2)
    symbols = tuple(words[comment.label :: width])
    warnings: list[str] = []
    frames = partial(_frames, path, symbols, comment, quantity, drop_cut, warnings)
    return Source(
        path,
        symbols,
        comment.quantity,
        comment.unit,
        comment.cell_unit,
        frames,
        comment.step is not None,
        warnings,
        about=round(path.stat().st_size / sum(len(line.encode()) for line in lines)),
        digits=6 if fixed else 16,
    )


def read_comment(line: str, path: Path, frame: int, wanted: str = "") -> Comment:
    """What the comment line of a frame says.

    Raises
    ------
    DataError
        It names two quantities, or lacks the column that is wanted.
    """
    if "Properties=" in line:
        return _extended(line, path, frame, wanted)
    step = _STEP.search(line)
    named = _QUANTITY.findall(line)
    units = {q: u for q, u in named if q == "cell"}
    quantities = [(q, u) for q, u in named if q != "cell"]
    if len(quantities) > 1:
        raise not_a_frame(
            path, frame, "an xyz", f"the comment names {' and '.join(q for q, _ in quantities)}"
        )
    quantity, unit = quantities[0] if quantities else ("", "")
    return Comment(
        int(step[1]) if step else None, quantity, unit, _cell(line, path, frame), units.get("cell", "")
    )


def _extended(line: str, path: Path, frame: int, wanted: str) -> Comment:
    from ase.io.extxyz import key_val_str_to_dict

    info = key_val_str_to_dict(line)
    fields = str(info["Properties"]).split(":")
    places: dict[str, tuple[int, int]] = {}
    column = 0
    for name, _, count in zip(fields[::3], fields[1::3], fields[2::3], strict=True):
        places[name] = (column, int(count))
        column += int(count)
    step = _STEP.search(str(info.get("ipi_comment", "")))
    named = [(q, u) for q, u in _QUANTITY.findall(str(info.get("ipi_comment", ""))) if q != "cell"]
    quantity, unit = named[0] if named else ("", "")
    if not named:
        # the definition of extended xyz: pos is in Angstrom; other columns have no agreed unit
        quantity, unit = (wanted, "") if wanted and wanted != "positions" else ("positions", "angstrom")
    column_name = "pos" if quantity == "positions" else quantity
    if column_name not in places or places[column_name][1] != 3:
        raise DataError(
            f"Frame {frame} of {path} has no column of three numbers called {column_name!r}, "
            f"only {', '.join(places)}.",
            "Choose one of these with quantity= (--quantity).",
        )
    if "species" not in places:
        raise not_a_frame(path, frame, "an extended xyz", "no column 'species'")
    first = places[column_name][0]
    lattice = info.get("Lattice")
    # ASE turns the nine numbers into a matrix with cell vectors as columns
    cell = (
        None if lattice is None else tuple(tuple(map(float, v)) for v in np.asarray(lattice).reshape(3, 3).T)
    )
    return Comment(
        int(step[1]) if step else None,
        quantity,
        unit,
        cell,
        "angstrom",
        (first, first + 1, first + 2),
        places["species"][0],
    )


def _cell(line: str, path: Path, frame: int) -> tuple[tuple[float, ...], ...] | None:
    found = _CELL.search(line)
    if not found:
        return None
    numbers = [float(x) for x in found[2].split()]
    if found[1] == "GENH":
        raise not_a_frame(path, frame, "an i-PI xyz", "CELL{GENH} belongs into inputs, not trajectories")
    if len(numbers) < (6 if found[1] == "abcABC" else 9):
        raise not_a_frame(path, frame, "an i-PI xyz", f"the cell has only {len(numbers)} numbers")
    # i-PI and ASE put a along x and b into the xy plane; H has the vectors as columns
    rows = cellpar_to_cell(numbers[:6]) if found[1] == "abcABC" else np.reshape(numbers[:9], (3, 3)).T
    return tuple(tuple(map(float, row)) for row in rows)


def _frame_lines(stream: BinaryIO, path: Path, frame: int) -> list[str]:
    head = stream.readline()
    if not head.strip():
        return []  # the end, or an empty line at the end
    try:
        n_atoms = int(head)
    except ValueError as error:
        if not head.endswith(b"\n"):
            return [head.decode("utf-8", "replace")]
        found = head.decode("utf-8", "replace").strip()[:40]
        raise not_a_frame(path, frame, "an xyz", f"expected the number of atoms, found {found!r}") from error
    if n_atoms < 1:
        raise not_a_frame(path, frame, "an xyz", f"{n_atoms} atoms")
    lines = [head, *(stream.readline() for _ in range(n_atoms + 1))]
    return [line.decode("utf-8", "replace") for line in lines]


def _is_whole(lines: list[str]) -> bool:
    return len(lines) > 2 and lines[-1].endswith("\n")


def _table(lines: list[str], comment: Comment, path: Path, frame: int) -> tuple[int, list[str], Array]:
    try:
        return words_to_table("".join(lines[2:]), len(lines) - 2, comment.columns)
    except ValueError as error:
        raise not_a_frame(
            path, frame, "an xyz", f"every line must be a label and three numbers ({error})"
        ) from error


def _frames(
    path: Path,
    symbols: tuple[str, ...],
    first: Comment,
    wanted: str,
    drop_cut: bool,
    warnings: list[str],
    n: int,
    atoms: Array | None,
) -> Iterator[Frames]:
    size = max(1, path.stat().st_size)
    same = _same(first)
    count = 0
    with path.open("rb") as stream:
        fixed = _FixedRows.of(stream, symbols, first)
        if fixed is not None:
            n = min(n, max(1, _PIECE // fixed.length))
        while True:
            start = stream.tell()
            block = fixed.read(stream, n, path, count, wanted) if fixed is not None else None
            if block is None:
                stream.seek(start)
                block = _slow_block(stream, n, path, count, symbols, same, wanted, drop_cut, warnings)
            comments, values = block
            if not comments:
                return
            for k, comment in enumerate(comments):
                if _same(comment) != same:
                    raise other_contents(path, count + k, _same(comment), same)
            steps = [count + k if c.step is None else c.step for k, c in enumerate(comments)]
            cells = None if first.cell is None else np.array([c.cell for c in comments], dtype=float)
            count += len(comments)
            yield Frames(
                (values if atoms is None else values[:, atoms])[:, None],
                np.array(steps, dtype=np.int64),
                cells,
                stream.tell() / size,
            )


def _same(comment: Comment) -> str:
    """What must not change from frame to frame, in words."""
    cell = "no cell" if comment.cell is None else f"cell{{{comment.cell_unit}}}"
    step = "" if comment.step is not None else ", no step"
    return f"{comment.quantity}{{{comment.unit}}}, {cell}{step}"


def _slow_block(
    stream: BinaryIO,
    n: int,
    path: Path,
    count: int,
    symbols: tuple[str, ...],
    same: str,
    wanted: str,
    drop_cut: bool,
    warnings: list[str],
) -> tuple[list[Comment], Array]:
    comments: list[Comment] = []
    values: list[Array] = []
    while len(comments) < n and (lines := _frame_lines(stream, path, count)):
        if not _is_whole(lines):
            if not drop_cut:
                raise cut_frame(path, count)
            warnings.append(f"the last frame of {path.name} is cut off and was left out")
            stream.seek(0, 2)
            break
        comment = read_comment(lines[1], path, count, wanted)
        width, words, table = _table(lines, comment, path, count)
        if tuple(words[comment.label :: width]) != symbols:
            raise other_contents(path, count, f"{len(table)} atoms", f"{len(symbols)} atoms, by label")
        comments.append(comment)
        values.append(table)
        count += 1
    return comments, np.array(values)


@dataclass(frozen=True)
class _FixedRows:
    """The layout of a file whose frames are all as long as the first, in i-PI's fixed rows."""

    head: bytes  # the line with the number of atoms
    comment: int  # where the comment ends
    labels: Array  # (n_atoms, 8) characters
    length: int  # bytes of a frame

    @staticmethod
    def of(stream: BinaryIO, symbols: tuple[str, ...], first: Comment) -> _FixedRows | None:
        head, comment = stream.readline(), stream.readline()
        body = stream.read(_ROW * len(symbols))
        stream.seek(0)
        if len(body) != _ROW * len(symbols) or first.columns != (1, 2, 3) or first.label != 0:
            return None
        rows = np.frombuffer(body, np.uint8).reshape(-1, _ROW)
        end = len(head) + len(comment)
        return _FixedRows(head, end, rows[:, :_LABEL].copy(), end + len(body))

    def read(
        self, stream: BinaryIO, n: int, path: Path, count: int, wanted: str
    ) -> tuple[list[Comment], Array] | None:
        """At most n frames, or None when the next ones are not laid out like the first."""
        data = stream.read(n * self.length)
        whole = len(data) // self.length
        if whole == 0 or len(data) % self.length:
            return None
        text = np.frombuffer(data, np.uint8).reshape(whole, self.length)
        rows = text[:, self.comment :].reshape(-1, _ROW)
        expected = np.frombuffer(self.head, np.uint8)
        if (
            (text[:, : len(self.head)] != expected).any()
            or (text[:, self.comment - 1] != 10).any()
            or (text[:, len(self.head) : self.comment - 1] == 10).any()
            or (rows[:, _ROW - 1] != 10).any()
            or (rows[:, [s - 1 for s in _STARTS]] != 32).any()
            or (rows[:, :_LABEL].reshape(whole, -1, _LABEL) != self.labels).any()
        ):
            return None
        values = np.empty((len(rows), 3))
        for k, start in enumerate(_STARTS):
            column = fixed_numbers(rows[:, start : start + 12])
            if column is None:
                return None
            values[:, k] = column
        comments = _comments(text[:, len(self.head) : self.comment], path, count, wanted)
        return comments, values.reshape(whole, -1, 3)


def _comments(text: Array, path: Path, count: int, wanted: str) -> list[Comment]:
    """The comments of frames, parsed anew only where more than the step has changed."""
    from dataclasses import replace

    comments: list[Comment] = []
    last, known = "", None
    for k in range(len(text)):
        line = text[k].tobytes().decode("utf-8", "replace")
        step = _STEP.search(line)
        rest = line if step is None else line[: step.start()] + line[step.end() :]
        if known is None or rest != last:
            known = read_comment(line, path, count + k, wanted)
            last = rest
        comments.append(known if step is None else replace(known, step=int(step[1])))
    return comments
