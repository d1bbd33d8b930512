"""Picture of the densities of states: what moves, and what of it neutrons see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnqmd_server.spectra.output import pictures as p
from nnqmd_server.spectra.output.labelled import Quantity, Result

Array = np.ndarray


def draw_dos(folder: Path, result: Result) -> list[Path]:
    """VDOS against GDOS, and VDOS by element; returns what was written."""
    with p.style():
        figure = Figure(figsize=(9.5, 7), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=False)
        data = result.data[0]
        x = data["energy"].values
        for name, colour, label in (
            ("vdos", p.BLACK, "VDOS: every atom counts alike"),
            ("gdos", p.RED, "GDOS: weighted with $\\sigma/M$"),
        ):
            _curve(top, x, data[name], colour, label)
        for curve, colour in zip(data.startswith("vdos_"), p.COLOURS * 20, strict=False):
            _curve(bottom, x, curve, colour, curve.title.split(",")[0])
        top.set_ylabel(f"density, area one ({p.unit('1/meV')})")
        bottom.set_ylabel(f"density per atom ({p.unit('1/meV')})")
        if "deconvolved" in result:
            free = result["deconvolved"]
            for curve, colour in zip(free.startswith("free_"), p.COLOURS * 20, strict=False):
                label = f"{curve.title.split(',')[0]}, without thermostat"
                bottom.plot(free.axes[0].values, curve.values, color=colour, lw=1.0, ls="--", label=label)
        bottom.legend(title="VDOS by element")
        top.legend()
        for axes, text in ((top, "a"), (bottom, "b")):
            axes.set_xlim(0, np.ceil(x[-1] / 10) * 10)
            axes.set_ylim(bottom=0)
            p.energy_axes(axes, "energy")
            p.letter(axes, text)
        p.headline(figure, result.title, result.settings.get("in short", ""))
        return p.save(figure, folder / result.kind)


def _curve(axes: Axes, x: Array, curve: Quantity, colour: str, label: str) -> None:
    if curve.error is not None:
        axes.fill_between(
            x,
            curve.values - curve.error,
            curve.values + curve.error,
            color=colour,
            alpha=0.25,
            lw=0,
            label="standard error" if curve.name == "vdos" else None,
        )
    axes.plot(x, curve.values, color=colour, lw=1.2, label=label)
