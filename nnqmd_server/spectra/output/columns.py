"""Plain columns whose header says how every number was made.

The header is for people and for programs: every column has a line with its name, its unit and, where it
follows from other columns, a formula in Python's notation with the constants given above it. The last
header line is the names alone; `numpy.loadtxt` reads the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nnqmd_server import __version__
from nnqmd_server.spectra.output.files import whole_file
from nnqmd_server.spectra.output.labelled import Labelled, Quantity, Result

WIDTH = 15


def write_columns(folder: Path, result: Result) -> list[Path]:
    """Write every curve of a result as text: one file per axis, ``KIND.txt`` and ``KIND-BLOCK.txt``.

    Maps of two dimensions are left to the NeXus file.

    Returns
    -------
    list of Path
        The files written.
    """
    written = []
    for name, data in _by_axis(result):
        path = folder / f"{name}.txt"
        columns = list(_columns(data))
        header = [*_header(result, data), " ".join(f"{q.name:>{WIDTH}s}" for q in columns).lstrip()]
        with whole_file(path) as temporary:
            # the first name stands behind "# ", so the first column is two characters narrower
            np.savetxt(
                temporary,
                np.array([q.values for q in columns]).T,
                fmt=[f"%{max(WIDTH, len(q.name))}.7e" for q in columns],
                header="\n".join(header),
                encoding="utf-8",
            )
        written.append(path)
    return written


def _by_axis(result: Result) -> Iterator[tuple[str, list[Labelled]]]:
    main = result.main_axis()
    yield result.kind, list(main)
    for block in result.data:
        if len(block.axes) == 1 and block not in main:
            yield f"{result.kind}-{block.name}", [block]


def _columns(data: list[Labelled]) -> Iterator[Quantity]:
    yield data[0].axes[0]
    seen = set()
    for block in data:
        for other in block.coordinates:
            if other.name not in seen:
                seen.add(other.name)
                yield other
        for curve in block.curves:
            yield curve
            if curve.error is not None:
                yield Quantity(
                    f"{curve.name}_error",
                    curve.error,
                    curve.unit,
                    f"standard error of the mean of {curve.name}",
                )


def _header(result: Result, data: list[Labelled]) -> Iterator[str]:
    yield f"{result.title}; nnqmd-server {__version__}"
    yield ""
    yield from result.formulas
    yield ""
    for name, value in result.settings.items():
        yield f"{name}: {value}"
    for table in result.tables:
        yield ""
        yield from _table(table.title, table.columns, table.rows)
    if result.notes:
        yield ""
        for note in result.notes:
            yield f"note: {note}"
    if result.constants:
        yield ""
        yield "constants of the formulas below:"
        for name, constant in result.constants.items():
            yield f"  {name} = {constant.value!r} [{constant.unit or '1'}] {constant.meaning}"
    yield ""
    yield "columns:"
    for number, quantity in enumerate(_columns(data), 1):
        formula = f" = {quantity.formula}" if quantity.formula else ""
        yield f"  {number:2d} {quantity.name} [{quantity.unit or '1'}]{formula}; {quantity.title}"


def _table(title: str, names: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    widths = [max(len(str(row[k])) for row in (names, *rows)) for k in range(len(names))]
    yield f"{title}:"
    for row in (names, *rows):
        yield "  " + "  ".join(f"{cell:>{w}s}" for cell, w in zip(row, widths, strict=True))
