"""Picture of infrared absorption with its error band."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nnqmd_server.spectra.output import pictures as p
from nnqmd_server.spectra.output.labelled import Result


def draw_ir(folder: Path, result: Result) -> list[Path]:
    """Absorption with the standard error of every point, and the dipole route as a check."""
    with p.style():
        figure = Figure(figsize=(9.5, 4.8), layout="constrained")
        axes = figure.subplots()
        data = result.data[0]
        x, main = data.axes[0].values, data["n_alpha"]
        if main.error is not None:
            axes.fill_between(
                x,
                (main.values - main.error) / 1e3,
                (main.values + main.error) / 1e3,
                color=p.SKY,
                alpha=0.45,
                lw=0,
                label="standard error of the mean",
            )
        axes.plot(x, main.values / 1e3, color=p.BLUE, lw=1.3, label="from the current")
        for check in data.startswith("n_alpha_dipole"):
            axes.plot(x, check.values / 1e3, color=p.ORANGE, lw=0.9, ls="--", label="from the dipole (check)")
        if "experiment" in result:
            measured = result["experiment"]
            points = measured.curves[0]
            axes.plot(measured.axes[0].values, points.values / 1e3, color="0.3", lw=0.9, label=points.title)
        axes.axhline(0, color="0.7", lw=0.6, zorder=0)
        axes.set_xlim(0, np.ceil(x[-1]))
        axes.set_ylabel(r"$n(\omega)\,\alpha(\omega)$ (10$^3$ cm$^{-1}$)")
        p.energy_axes(axes, "wavenumber", "photon energy")
        axes.legend()
        p.headline(figure, result.title, result.settings.get("in short", ""))
        return p.save(figure, folder / result.kind)
