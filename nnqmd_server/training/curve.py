"""The learning curve of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from nnqmd_server.training.progress import Epoch
from nnqmd_server.units import GPA

PANELS = (
    ("energy_rmse", "energy rmse (meV/atom)", 1e3),
    ("forces_rmse", "force rmse (meV/Å)", 1e3),
    ("stress_rmse", "stress rmse (GPa)", 1 / GPA),
    ("wannier_centroid_rmse", "Wannier centroid rmse (mÅ)", 1e3),
)


class _Plainly(LogFormatter):
    """The ticks that matplotlib would name, as 0.165 and not as 1.65 x 10^-1."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plot_learning_curve(epochs: Sequence[Epoch], path: Path) -> None:
    """Draw the validation errors and the training loss against the epoch into a PNG file."""
    figure = Figure(figsize=(10.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    count = np.array([epoch.epoch + 1 for epoch in epochs])
    best = min(epochs, key=lambda epoch: epoch.score).epoch + 1
    drawn = [panel for panel in PANELS if np.isfinite([getattr(e, panel[0]) for e in epochs]).any()]
    axes = figure.subplots(2, (len(drawn) + 2) // 2, squeeze=False).ravel()
    for axis, (name, label, factor) in zip(axes, drawn, strict=False):
        axis.semilogy(count, [getattr(e, name) * factor for e in epochs], lw=1.2)
        axis.set(xlabel="epoch", ylabel=label, title="validation")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(_Plainly(minor_thresholds=(2, 0.5)))
    loss = axes[len(drawn)]
    loss.semilogy(count, [e.train_loss for e in epochs], lw=1.2, color="C1")
    loss.set(xlabel="epoch", ylabel="loss (weighted, eV and Å)", title="training")
    for axis in axes[len(drawn) + 1 :]:
        axis.set_axis_off()
    for axis in axes[: len(drawn) + 1]:
        axis.axvline(best, color="0.6", lw=0.8, ls="--")
    figure.suptitle(f"Learning curve; the dashed line is the packaged epoch, {best}")
    figure.savefig(path, dpi=130)
