"""What the spectrum commands print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress
from rich.table import Table

from nnqmd_server.cli.terminal import console

if TYPE_CHECKING:
    from nnqmd_server.spectra.output.labelled import Result
    from nnqmd_server.structures import Array


@contextmanager
def progress(name: str) -> Iterator[Callable[[float], None]]:
    """A bar from 0 to 1, which goes away when done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def show(result: Result, written: Sequence[Path]) -> None:
    """Print the tables, the peaks of the main curve, the notes and what was written."""
    for numbers in result.tables:
        console.print(f"[bold]{numbers.title}[/]")
        table = Table(box=None, pad_edge=False)
        for column in numbers.columns:
            table.add_column(column, justify="right")
        for row in numbers.rows:
            table.add_row(*row)
        console.print(table)
    spectrum = result.data[0]
    main = spectrum.curves[0]
    elastic = next((c.values for c in spectrum.curves if c.name.startswith("order0")), 0.0)
    found = peaks(spectrum.axes[0].values, main.values - elastic, above=25.0)
    console.print(f"peaks of {main.name}: {found} cm^-1")
    for name in ("experiment",):
        if name in result.settings:
            console.print(f"{name}: {result.settings[name]}")
    for note in result.notes:
        console.print(f"[yellow]note:[/] {note}")
    wrote(written)


def wrote(paths: Sequence[Path]) -> None:
    """Print what was written: one line per folder."""
    folders: dict[Path, list[str]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path.name)
    for folder, names in folders.items():
        console.print(f"wrote into [bold]{folder}[/]: {', '.join(names)}")


def peaks(energy: Array, values: Array, above: float) -> str:
    """The eight most prominent maxima, in words."""
    from scipy.signal import find_peaks

    seen = energy > above
    where, found = find_peaks(values[seen], prominence=0.05 * values[seen].max())
    strongest = sorted(where[found["prominences"].argsort()[::-1][:8]])
    return ", ".join(f"{energy[seen][k]:.0f}" for k in strongest) or "none"
