"""Pictures of neutron spectra: banks and orders, elements, the Q-E map, and beside an experiment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from nnqmd_server.spectra.output import pictures as p
from nnqmd_server.spectra.output.labelled import Labelled, Quantity, Result
from nnqmd_server.units import MEV_PER_INVCM

Array = np.ndarray

LOW_END = 1000.0
"""Right end of the panel of lattice modes [cm^-1]."""

_ORDER_COLOURS = ("0.78", p.BLUE, p.SKY, p.ORANGE, p.RED)
_ORDER_NAMES = ("0 (elastic)", "1", "2", "3", "4 and more")


def draw_ins(folder: Path, result: Result) -> list[Path]:
    """All pictures of a neutron spectrum; returns what was written."""
    with p.style():
        written = p.save(_banks_and_orders(result), folder / result.kind)
        written += p.save(_elements(result), folder / f"{result.kind}-elements")
        if "map" in result:
            written += p.save(_map(result), folder / f"{result.kind}-map")
        if "experiment" in result:
            written += p.save(_experiment(result), folder / f"{result.kind}-experiment")
    return written


def _banks_and_orders(result: Result) -> Figure:
    spectrum = result.data[0]
    figure = Figure(figsize=(10.5, 8), layout="constrained")
    top, bottom = figure.subplots(2, 2, width_ratios=[1, 1.3])
    for row, draw in ((top, _draw_banks), (bottom, _draw_orders)):
        for axes, end in zip(row, _ends(spectrum), strict=True):
            draw(axes, spectrum, _x(result), _shown(spectrum, end))
            _frame(axes, result, end)
    for axes, text in zip((*top, *bottom), "abcd", strict=True):
        p.letter(axes, text)
    top[1].legend()
    bottom[1].legend(title=f"quanta, {_bank_title(spectrum, 0)}", reverse=True)
    p.headline(figure, result.title, _subtitle(result))
    return figure


def _elements(result: Result) -> Figure:
    spectrum = result.data[0]
    bank = _banks(spectrum)[0]
    figure = Figure(figsize=(10.5, 4.3), layout="constrained")
    row = figure.subplots(1, 2, width_ratios=[1, 1.3])
    for axes, end in zip(row, _ends(spectrum), strict=True):
        total = spectrum[f"total_{bank}"]
        axes.plot(_x(result), total.values, color="0.75", lw=3.2, label="all")
        for curve, colour in zip(_element_curves(spectrum, bank), p.COLOURS * 20, strict=False):
            axes.plot(
                _x(result),
                curve.values,
                color=colour,
                lw=1.1,
                label=curve.title.rsplit(" what ", 1)[-1].removesuffix(" adds"),
            )
        _frame(axes, result, end)
    for axes, text in zip(row, "ab", strict=True):
        p.letter(axes, text)
    row[1].legend(title=_bank_title(spectrum, 0))
    p.headline(figure, f"{result.title}: by element", _subtitle(result))
    return figure


def _map(result: Result) -> Figure:
    data = result["map"]
    Q, energy, values = data.axes[0].values, data.axes[1].values, data.curves[0].values
    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    axes = figure.subplots()
    inelastic = values[:, energy > max(40.0, _first_inelastic(result))]
    highest = float(np.quantile(inelastic, 0.999))
    mesh = axes.pcolormesh(
        energy * _factor(result),
        Q,
        np.maximum(values, 1e-4 * highest),
        norm=LogNorm(1e-3 * highest, highest),
        cmap="viridis",
        shading="nearest",
        rasterized=True,
    )
    lines = [c for c in result.data[0].coordinates if c.name.startswith("Q_") and c.name != "Q_rms"]
    for line, dash in zip(lines, ("-", "--", ":", "-.") * 20, strict=False):
        axes.plot(
            _x(result),
            line.values,
            color="white",
            lw=1.5,
            ls=dash,
            label=line.title.removeprefix("momentum transfer, "),
            path_effects=[withStroke(linewidth=3, foreground="black")],
        )
    axes.set_xlim(0.0, energy[-1] * _factor(result))
    axes.set_ylim(Q[0], Q[-1])
    axes.set_ylabel(f"momentum transfer Q ({p.unit('1/angstrom')})")
    p.energy_axes(axes, meV=_in_meV(result))
    axes.legend(
        loc="lower right",
        title="between these lines" if _in_meV(result) else "along these lines",
        frameon=True,
        facecolor="0.35",
        labelcolor="white",
    ).get_title().set_color("white")
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label(f"S(Q,E), powder ({p.unit('barn/(sr*meV)')})")
    p.headline(figure, f"{result.title}: S(Q,E) and what the instrument sees", _subtitle(result))
    return figure


def _experiment(result: Result) -> Figure:
    spectrum, measured = result.data[0], result["experiment"]
    figure = Figure(figsize=(10.5, 4.5), layout="constrained")
    row = figure.subplots(1, 2, width_ratios=[1, 1.3])
    x, main = _x(result), spectrum.curves[0]
    points = measured.curves[0]
    for axes, end in zip(row, _ends(spectrum), strict=True):
        energy = measured.axes[0].values * _factor(result)
        if points.error is not None:
            axes.fill_between(
                energy, points.values - points.error, points.values + points.error, color="0.8", lw=0
            )
        axes.plot(energy, points.values, color="0.35", lw=0.9, label=points.title)
        axes.plot(x, main.values, color=p.RED, lw=1.3, label=f"computed, {main.title}")
        _frame(axes, result, end)
        seen = (energy > 30.0 * _factor(result)) & (energy <= end * _factor(result))
        axes.set_ylim(0, max(axes.get_ylim()[1], p.top_of([points.values[seen]])))
    for axes, text in zip(row, "ab", strict=True):
        p.letter(axes, text)
    row[1].legend()
    p.headline(figure, f"{result.title}: beside the experiment", _subtitle(result))
    return figure


def _draw_banks(axes: Axes, spectrum: Labelled, x: Array, shown: slice) -> None:
    for k, colour in zip(range(len(_banks(spectrum))), (p.BLACK, p.RED, p.BLUE, p.GREEN) * 20, strict=False):
        curve = spectrum.startswith("total_")[k]
        if curve.error is not None:
            axes.fill_between(
                x[shown],
                (curve.values - curve.error)[shown],
                (curve.values + curve.error)[shown],
                color=colour,
                alpha=0.25,
                lw=0,
                label="standard error" if k == 0 else None,
            )
        axes.plot(x[shown], curve.values[shown], color=colour, lw=1.2, label=_bank_title(spectrum, k))


def _draw_orders(axes: Axes, spectrum: Labelled, x: Array, shown: slice) -> None:
    bank = _banks(spectrum)[0]
    axes.stackplot(
        x[shown],
        [spectrum[f"order{n}_{bank}"].values[shown] for n in range(5)],
        colors=_ORDER_COLOURS,
        labels=_ORDER_NAMES,
        lw=0,
    )
    axes.plot(x[shown], spectrum[f"total_{bank}"].values[shown], color=p.BLACK, lw=0.8)


def _shown(spectrum: Labelled, end: float) -> slice:
    """Points from 0 to ``end`` [cm^-1], and one beyond on either side."""
    x = spectrum.axes[0].values
    return slice(max(0, int(np.searchsorted(x, 0.0)) - 1), int(np.searchsorted(x, end)) + 2)


def _frame(axes: Axes, result: Result, end: float) -> None:
    """Limits from 0 to ``end`` [cm^-1]; the elastic line may run out of the picture."""
    spectrum = result.data[0]
    x = spectrum.axes[0].values
    seen = (x > min(_first_inelastic(result), 0.5 * end)) & (x <= end)
    axes.set_xlim(0, end * _factor(result))
    axes.set_ylim(0, p.top_of([c.values[seen] for c in spectrum.startswith("total_")]))
    axes.set_ylabel(f"intensity per atom ({p.unit(spectrum.curves[0].unit)})")
    p.energy_axes(axes, meV=_in_meV(result))


def _in_meV(result: Result) -> bool:
    """Direct geometry is shown in meV, indirect geometry in cm^-1, as their users do."""
    return "Ei" in result.constants


def _factor(result: Result) -> float:
    return MEV_PER_INVCM if _in_meV(result) else 1.0


def _x(result: Result) -> Array:
    return result.data[0].axes[0].values * _factor(result)


def _first_inelastic(result: Result) -> float:
    """Where the elastic line has faded [cm^-1]."""
    spectrum = result.data[0]
    bank = _banks(spectrum)[0]
    total, elastic = spectrum[f"total_{bank}"].values, spectrum[f"order0_{bank}"].values
    x = spectrum.axes[0].values
    strong = (elastic > 0.5 * total) & (x < 300.0)
    return float(x[strong][-1]) if strong.any() else 0.0


def _ends(spectrum: Labelled) -> tuple[float, float]:
    last = float(spectrum.axes[0].values[-1])
    return min(LOW_END, 0.5 * last), last


def _banks(spectrum: Labelled) -> list[str]:
    return [c.name.removeprefix("total_") for c in spectrum.startswith("total_")]


def _element_curves(spectrum: Labelled, bank: str) -> list[Quantity]:
    return [c for c in spectrum.curves if c.name.endswith(f"_{bank}") and " adds" in c.title]


def _bank_title(spectrum: Labelled, k: int) -> str:
    return spectrum.startswith("total_")[k].title.removesuffix(", all orders")


def _subtitle(result: Result) -> str:
    return result.settings.get("in short", "")
