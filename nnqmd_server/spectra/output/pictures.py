"""What all pictures share: style, axes in two units, and how they are saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnqmd_server.spectra.output.files import whole_file
from nnqmd_server.units import MEV_PER_INVCM

Array = np.ndarray

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLACK, BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#000000",
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#999999",
)
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK)
"""For curves of equal standing, such as elements."""

UNITS = {
    "1/cm": "cm$^{-1}$",
    "1/meV": "meV$^{-1}$",
    "1/angstrom": "Å$^{-1}$",
    "barn/(sr*meV)": "barn sr$^{-1}$ meV$^{-1}$",
    "angstrom^6*cm": "Å$^6$ cm",
}

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.linewidth": 0.8,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "xtick.minor.visible": True,
    "ytick.minor.visible": True,
    "ytick.right": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "nnqmd",  # the same data give the same file
    "mathtext.default": "regular",
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.use_mathtext": True,
}


@contextmanager
def style() -> Iterator[None]:
    """The house's settings of matplotlib, for what is drawn inside."""
    with mpl.rc_context(_STYLE):
        yield


def unit(name: str) -> str:
    """A unit as a picture shows it."""
    return UNITS.get(name, name)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` (200 dots per inch) and ``stem.svg``.

    Raises
    ------
    OutputError
        They cannot be written; nothing partial is left.
    """
    written = []
    for suffix, options in ((".png", {"dpi": 200}), (".svg", {"metadata": {"Date": None}})):
        path = stem.with_name(stem.name + suffix)
        with whole_file(path) as temporary:
            figure.savefig(temporary, **options)
        written.append(path)
    return written


def energy_axes(axes: Axes, name: str = "energy transfer", above: str = "", meV: bool = False) -> None:
    """Energies in cm^-1 below and in meV above, or with ``meV`` the other way round."""
    both = (_to_mev, _to_invcm)
    below, top = ("meV", "cm$^{-1}$") if meV else ("cm$^{-1}$", "meV")
    axes.set_xlabel(f"{name} ({below})")
    other = axes.secondary_xaxis("top", functions=both[::-1] if meV else both)
    other.set_xlabel(f"{above or name} ({top})")
    other.minorticks_on()


def _to_mev(wavenumber: Array) -> Array:
    return np.asarray(wavenumber) * MEV_PER_INVCM


def _to_invcm(energy: Array) -> Array:
    return np.asarray(energy) / MEV_PER_INVCM


def headline(figure: Figure, title: str, subtitle: str) -> None:
    """A title, and below it in smaller letters what belongs to it."""
    subtitle = subtitle.replace("cm^-1", "cm$^{-1}$")
    figure.suptitle(title if not subtitle else f"{title}\n{subtitle}", fontsize=10.5)


def letter(axes: Axes, text: str) -> None:
    """A panel's letter, above its upper left corner."""
    axes.annotate(
        text, (0, 1), xycoords="axes fraction", xytext=(-38, 24), textcoords="offset points", weight="bold"
    )


def top_of(curves: list[Array]) -> float:
    """Upper limit for an axis that shows these curves from zero on."""
    highest = max((float(np.max(c)) for c in curves if len(c)), default=0.0)
    return 1.12 * highest if highest > 0 else 1.0
