"""Picture of a Raman spectrum, polarized and depolarized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nnqmd_server.spectra.output import pictures as p
from nnqmd_server.spectra.output.labelled import Result


def draw_raman(folder: Path, result: Result) -> list[Path]:
    """VV and VH with the standard error of every point; returns what was written."""
    with p.style():
        figure = Figure(figsize=(9.5, 4.8), layout="constrained")
        axes = figure.subplots()
        data = result.data[0]
        x = data.axes[0].values
        for name, colour in (("VV", p.BLUE), ("VH", p.RED)):
            curve = data[name]
            if curve.error is not None:
                axes.fill_between(
                    x, curve.values - curve.error, curve.values + curve.error, color=colour, alpha=0.25, lw=0
                )
            axes.plot(x, curve.values, color=colour, lw=1.2, label=curve.title)
        if "experiment" in result:
            points = result["experiment"].curves[0]
            axes.plot(
                result["experiment"].axes[0].values, points.values, color="0.3", lw=0.9, label=points.title
            )
        axes.axhline(0, color="0.7", lw=0.6, zorder=0)
        axes.set_xlim(0, np.ceil(x[-1]))
        axes.set_ylabel(f"intensity of the cell ({p.unit(data.curves[0].unit)})")
        p.energy_axes(axes, "Raman shift")
        axes.legend()
        p.headline(figure, result.title, result.settings.get("in short", ""))
        return p.save(figure, folder / result.kind)
