"""Write a result in all forms that were asked for, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nnqmd_server.errors import InputError
from nnqmd_server.spectra.output.columns import write_columns
from nnqmd_server.spectra.output.files import make_folder
from nnqmd_server.spectra.output.labelled import Result
from nnqmd_server.spectra.output.nexus import write_nexus
from nnqmd_server.spectra.output.oclimax import has_oclimax_layout, write_oclimax

FORMATS = ("nxs", "txt", "csv")
"""NeXus/HDF5, plain columns, and for indirect-geometry neutron spectra OCLIMAX's layout."""


def save(
    result: Result,
    folder: Path,
    formats: Sequence[str] = FORMATS,
    pictures: bool = True,
    report: bool = True,
    progress: Callable[[float], None] | None = None,
) -> list[Path]:
    """Write files, pictures and the report of a result into a folder.

    Parameters
    ----------
    result : Result
        From `ins_result`, `dos_result`, `ir_result` or `raman_result`.
    folder : Path
        Made if needed. Files are named after the kind of the result: ``ins.nxs``, ``ins.txt``, ...
    formats : sequence of str
        Of `FORMATS`; ``csv`` is passed over where OCLIMAX has no such layout.
    pictures, report : bool
        Draw PNG and SVG; write ``report.html`` about everything in the folder (needs ``nxs``).
    progress : callable, optional
        Called with the fraction done.

    Returns
    -------
    list of Path
        What was written.
    """
    unknown = set(formats) - set(FORMATS)
    if unknown:
        raise InputError(f"There is no format {sorted(unknown)[0]!r}.", f"Choose from {', '.join(FORMATS)}.")
    tell = progress or (lambda done: None)
    make_folder(folder)
    written: list[Path] = []
    if "nxs" in formats:  # before the pictures: the report leaves out those that are older
        written.append(write_nexus(folder / f"{result.kind}.nxs", result))
    if "txt" in formats:
        written += write_columns(folder, result)
    if "csv" in formats and has_oclimax_layout(result):
        written.append(write_oclimax(folder / f"{result.kind}.csv", result))
    tell(0.2)
    if pictures:
        written += draw(result, folder)
    tell(0.9)
    if report and "nxs" in formats:
        from nnqmd_server.spectra.output.report import write_report

        written.append(write_report(folder))
    tell(1.0)
    return written


def draw(result: Result, folder: Path) -> list[Path]:
    """Draw the pictures of a result, PNG and SVG; returns what was written."""
    from nnqmd_server.spectra.output.picture_dos import draw_dos
    from nnqmd_server.spectra.output.picture_ins import draw_ins
    from nnqmd_server.spectra.output.picture_ir import draw_ir
    from nnqmd_server.spectra.output.picture_raman import draw_raman

    make_folder(folder)
    drawers = {"ins": draw_ins, "dos": draw_dos, "ir": draw_ir, "raman": draw_raman}
    return drawers[result.kind](folder, result)
