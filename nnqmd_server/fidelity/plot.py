"""Picture of a study: times to failure against the number of atoms, survival, and sharpness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from nnqmd_server.fidelity.report import Series
from nnqmd_server.fidelity.sharpness import Sharpness
from nnqmd_server.fidelity.survival import kaplan_meier
from nnqmd_server.spectra.output import pictures as p

_SPREAD = 0.035
"""How far apart runs of one size are drawn, in units of log N."""


def draw(
    stem: Path, series: Sequence[Series], sharpness: Sequence[Sharpness], subtitle: str = ""
) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``; returns what was written."""
    with p.style():
        panels = 3 if sharpness else 2
        figure = Figure(figsize=(4.6 * panels, 4.4), layout="constrained")
        all_axes = figure.subplots(1, panels)
        _times(all_axes[0], series)
        _survival(all_axes[1], series)
        if sharpness:
            _sharpness(all_axes[2], series, sharpness)
        for axes, letter in zip(all_axes, "abc", strict=False):
            axes.set_title(letter, loc="left", weight="bold")
        p.headline(figure, "Time to failure against the number of atoms", subtitle)
        return p.save(figure, stem)


def _times(axes: Axes, series: Sequence[Series]) -> None:
    sizes = sorted({size.atoms for one in series for size in one.sizes})
    for k, (one, colour) in enumerate(zip(series, p.COLOURS * 10, strict=False)):
        shift = np.exp(_SPREAD * (2 * k - len(series) + 1) * 2)
        for failed, marker, face in ((True, "o", colour), (False, "^", "none")):
            for size in one.sizes:
                here = (one.runs.atoms == size.atoms) & (one.runs.failed == failed)
                jitter = np.exp(_SPREAD * np.linspace(-1, 1, max(2, here.sum())))[: here.sum()]
                axes.plot(
                    size.atoms * shift * jitter,
                    one.runs.times[here] * 1e-3,
                    marker,
                    ms=3.5 if failed else 5,
                    mec=colour,
                    mfc=face,
                    alpha=0.55,
                    lw=0,
                )
        known = [size for size in one.sizes if np.isfinite(size.mean)]
        if known:
            mean = np.array([size.mean for size in known])
            ends = np.array([[s.mean - s.low, s.high - s.mean] for s in known]).T
            axes.errorbar(
                np.array([s.atoms for s in known]) * shift,
                mean * 1e-3,
                ends * 1e-3,
                fmt="D",
                ms=6,
                color=colour,
                capsize=3,
                mec="white",
                label=one.runs.name if one.fit is None else None,
            )
        if one.fit:
            x = np.geomspace(sizes[0] / 1.15, sizes[-1] * 1.15, 50)
            interval = one.intervals[0]
            words = (
                f"{one.runs.name}: $\\beta$ = {one.fit.beta:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
            )
            axes.plot(x, one.fit.mean_at(x) * 1e-3, color=colour, lw=1.4, label=words)
    axes.plot([], [], "o", ms=3.5, color=p.GREY, label="a run that failed")
    axes.plot([], [], "^", ms=5, mec=p.GREY, mfc="none", label="a run that lives (censored)")
    axes.errorbar([], [], [], fmt="D", ms=6, color=p.GREY, capsize=3, label="mean time, 68 % interval")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("number of atoms N")
    axes.set_ylabel("time to failure (ps)")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
    axes.legend(fontsize=7)


def _survival(axes: Axes, series: Sequence[Series]) -> None:
    styles = ("-", "--", "-.", ":")
    for one, colour in zip(series, p.COLOURS * 10, strict=False):
        for size, line in zip(one.sizes, styles * 10, strict=False):
            here = one.runs.atoms == size.atoms
            times, alive = kaplan_meier(one.runs.times[here], one.runs.failed[here])
            end = one.runs.times[here].max()
            axes.step(
                np.append(times, end) * 1e-3,
                np.append(alive, alive[-1]),
                where="post",
                color=colour,
                ls=line,
                lw=1.1,
                label=f"{one.runs.name}, {size.atoms} atoms",
            )
    axes.set_ylim(0, 1.03)
    axes.set_xlim(left=0)
    axes.set_xlabel("time (ps)")
    axes.set_ylabel("share of runs that live (Kaplan-Meier)")
    axes.legend(fontsize=6.5)


def _sharpness(axes: Axes, series: Sequence[Series], sharpness: Sequence[Sharpness]) -> None:
    models = list(dict.fromkeys(one.model for one in sharpness))
    order = [one.runs.model for one in series]
    for model in models:
        colour = (p.COLOURS * 10)[order.index(model) if model in order else len(order)]
        own = [one for one in sharpness if one.model == model]
        axes.errorbar(
            [100 * one.epsilon for one in own],
            [one.rise for one in own],
            [one.rise_error for one in own],
            fmt="o-",
            ms=4,
            capsize=3,
            color=colour,
            label=f"{model} (force rmse {1e3 * own[0].force_rmse:.0f} meV/Å without noise)",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    noises = sorted({100 * one.epsilon for one in sharpness})
    axes.set_xticks(noises, labels=[f"{noise:g}" for noise in noises])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("noise on weights (% of their rms)")
    axes.set_ylabel("rise of the loss (eV$^2$/Å$^2$ and eV$^2$/atom$^2$)")
    axes.legend(fontsize=7)
