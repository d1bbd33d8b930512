"""The picture of a forecast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnqmd_server.errors import OutputError
from nnqmd_server.inputs.forecast import Forecast, shares

_COLOURS = {"model": "C0", "copies": "C1", "lists": "C2", "rest": "0.7", "evaluation": "C0"}
_WORDS = {"lists": "neighbour lists", "rest": "the rest"}


def plot_forecast(found: Forecast, path: Path) -> None:
    """Draw time per bead against batch, time per step against workers, and memory.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _batches(left, found)
    _workers(middle, found)
    _memory(right, found)
    asked = found.question
    figure.suptitle(
        f"{found.loaded.name} ({found.loaded.form}): {asked.structure.n_atoms} atoms, {asked.n_beads} beads,"
        f" {asked.timestep:g} fs: {found.step_ms:.3g} ms per step, {found.ns_per_day:.3g} ns per day",
        fontsize="medium",
    )
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:  # matplotlib says ValueError to an ending that it does not know
        raise OutputError(f"Cannot draw into {path}: {error}.", "Use --plot FILE.png.") from error


def _batches(axes: Axes, found: Forecast) -> None:
    names = [str(one.batch) for one in found.batches]
    bottom = np.zeros(len(names))
    parts = [shares(one) or {"evaluation": 1.0} for one in found.batches]
    for name in sorted(parts[0], key=list(_COLOURS).index):
        heights = np.array(
            [part[name] * one.per_bead for part, one in zip(parts, found.batches, strict=True)]
        )
        axes.bar(names, heights, bottom=bottom, color=_COLOURS[name], label=_WORDS.get(name, name))
        bottom += heights
    axes.set(xlabel="beads per batch", ylabel="time per bead (ms)", title="one process")
    axes.set_ylim(top=1.25 * bottom.max())  # room for the legend
    axes.legend(fontsize="small", frameon=False, loc="upper left", ncols=2)


def _workers(axes: Axes, found: Forecast) -> None:
    counts = np.array([one.workers for one in found.workers])
    times = np.array([one.per_set for one in found.workers])
    low, high = (np.array([np.quantile(one.milliseconds, q) for one in found.workers]) for q in (0.1, 0.9))
    bars = np.stack([np.maximum(times - low, 0), np.maximum(high - times, 0)])
    axes.errorbar(counts, times, yerr=bars, fmt="o-", capsize=3, label="all beads, median and 10 to 90 %")
    axes.plot(counts, times[0] * counts[0] / counts, "--", color="0.6", label="ideal")
    axes.plot(found.best.workers, found.best.per_set, "o", ms=12, mfc="none", color="C3", label="best")
    axes.set(xlabel="worker processes", ylabel="time per force set (ms)", title="served", xticks=counts)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", frameon=False)


def _memory(axes: Axes, found: Forecast) -> None:
    names = [str(one.batch) for one in found.batches]
    axes.plot(names, [one.memory_mb for one in found.batches], "o-", label="resident memory, peak")
    if any(one.gpu_mb for one in found.batches):
        axes.plot(names, [one.gpu_mb for one in found.batches], "s-", label="memory of the GPU, peak")
    axes.axhline(found.loaded.memory_mb, color="0.6", ls="--", label="the loaded model")
    axes.set(xlabel="beads per batch", ylabel="memory of a worker (MB)", title="memory")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # flat lines would lie on the frame
    axes.legend(fontsize="small", frameon=False)
