"""The sharpness of models on the terminal: for ``nnqmd fidelity`` and ``nnqmd model sharpness``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nnqmd_server.cli.terminal import console

if TYPE_CHECKING:
    from nnqmd_server.fidelity.sharpness import Sharpness


def parse_noise(text: str) -> list[float]:
    """Relative strengths of the noise, from ``0.01,0.05``."""
    from nnqmd_server.errors import InputError

    try:
        found = sorted({float(word) for word in text.replace(",", " ").split()})
    except ValueError:
        found = []
    if not found or not 0 < found[0] <= found[-1] < 10:
        raise InputError(f"--noise {text!r} is not a list of numbers above zero.", "Write --noise 0.01,0.05.")
    return found


def measure_sharpness(
    models: Mapping[str, str], frames: Path, strengths: Sequence[float], draws: int
) -> list[Sharpness]:
    """Shake every model with the same draws, behind a progress bar."""
    from nnqmd_server.fidelity.sharpness import measure
    from nnqmd_server.training.data import read_frames

    labelled = read_frames(frames)
    found = []
    each = 1 + draws * len(strengths)
    columns = (TextColumn("sharpness"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=each * len(models))
        for k, (name, source) in enumerate(models.items()):

            def tell(done: int, before: int = k * each, name: str = name) -> None:
                progress.update(bar, completed=before + done, description=name)

            found += measure(name, Path(source), labelled, strengths, draws, tell=tell)
    return found


def sharpness_table(sharpness: Sequence[Sharpness]) -> Table:
    """A line for each model and strength."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", overflow="fold")
    for name in ("noise (%)", "loss", "rise of the loss", "force rmse (meV/A)", "shaken (meV/A)"):
        table.add_column(name, justify="right")
    for s in sharpness:
        row = (f"{100 * s.epsilon:g}", f"{s.loss:.4g}", f"{s.rise:.3g} +- {s.rise_error:.2g}")
        forces = (f"{1e3 * s.force_rmse:.0f}", f"{1e3 * s.force_rmse_shaken:.0f}")
        table.add_row(s.model, *row, *forces)
    return table
