"""Options that several spectrum commands share, and what they may be."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nnqmd_server.errors import InputError

READING, PHYSICS, WRITING = "What is read", "How it is computed", "What is written"


class State(StrEnum):
    """How slow motion is treated."""

    auto = "auto"
    solid = "solid"
    liquid = "liquid"


class Window(StrEnum):
    """Shape of the window on correlation functions."""

    hann = "hann"
    gaussian = "gaussian"
    none = "none"


class Format(StrEnum):
    """Files of numbers."""

    nxs = "nxs"
    txt = "txt"
    csv = "csv"


Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN",
        help="folders that `nnqmd run` made, or trajectory files; several are independent runs of one system",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="temperature in K; the run's own by default", rich_help_panel=READING),
]
Skip = Annotated[
    float, typer.Option(help="fs at the start of every run to leave out", rich_help_panel=READING)
]
Timestep = Annotated[
    float | None,
    typer.Option(
        help="simulation time step in fs, for a file whose frames have step numbers", rich_help_panel=READING
    ),
]
Interval = Annotated[
    float | None,
    typer.Option(
        help="time between frames in fs, for a file that has no step numbers", rich_help_panel=READING
    ),
]
Unit = Annotated[
    str,
    typer.Option(
        help="unit of a file that does not say; for LAMMPS its unit style: metal, real",
        rich_help_panel=READING,
    ),
]
Elements = Annotated[
    str, typer.Option(help="elements of LAMMPS' atom types 1, 2, ...: O,H", rich_help_panel=READING)
]
DropCut = Annotated[
    bool,
    typer.Option(
        "--drop-cut",
        help="leave out a last frame that was cut off when the run was killed",
        rich_help_panel=READING,
    ),
]
Lag = Annotated[
    float | None,
    typer.Option(help="length of the correlation window in fs; chosen by default", rich_help_panel=PHYSICS),
]
WindowName = Annotated[
    Window, typer.Option("--window", help="window on the correlation functions", rich_help_panel=PHYSICS)
]
Highest = Annotated[float, typer.Option(help="last energy or wavenumber in cm^-1", rich_help_panel=PHYSICS)]
Groups = Annotated[
    list[str],
    typer.Option(
        "--group",
        metavar="NAME=ATOMS",
        help="show these atoms by themselves: methyl=0,1,4-7; atoms are counted from 0; may be repeated",
        rich_help_panel=PHYSICS,
    ),
]
Isotopes = Annotated[
    list[str],
    typer.Option(
        "--isotope",
        metavar="LABEL=WHAT",
        help="scatter as another isotope, or with a cross-section in barn: H=D, O=O18, H=7.64; may be "
        "repeated; the motion stays that of the run",
        rich_help_panel=PHYSICS,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="folder for everything; RUN by default, when there is one", rich_help_panel=WRITING),
]
Formats = Annotated[
    list[Format],
    typer.Option(
        "--format",
        help="files of numbers: nxs (NeXus/HDF5), txt (columns), csv (OCLIMAX's layout); may be repeated",
        rich_help_panel=WRITING,
    ),
]
Pictures = Annotated[
    bool, typer.Option("--pictures/--no-pictures", help="draw PNG and SVG", rich_help_panel=WRITING)
]
Measured = Annotated[
    Path | None,
    typer.Option(
        "--experiment",
        help="measured spectrum to show beside it: columns of energy, intensity and, if known, error",
        rich_help_panel=WRITING,
    ),
]
MeasuredUnit = Annotated[
    str,
    typer.Option(
        "--experiment-unit", help="meV or cm^-1, where the header does not say", rich_help_panel=WRITING
    ),
]
FitRange = Annotated[
    tuple[float, float],
    typer.Option(
        help="cm^-1 over which the measured spectrum is scaled to the computed one", rich_help_panel=WRITING
    ),
]
EVERY_FORMAT = [Format.nxs, Format.txt, Format.csv]


def check(
    temperature: float | None = None, lag: float | None = None, skip: float = 0.0, highest: float = 4000.0
) -> None:
    """Refuse numbers that make no sense."""
    for name, value in (("--temperature", temperature), ("--lag", lag)):
        if value is not None and not 0 < value < 1e9:
            raise InputError(f"{name} {value:g} makes no sense.", "Give a positive number.")
    if not 0 <= skip < 1e12:
        raise InputError(f"--skip {skip:g} makes no sense.", "Give a time in fs, 0 or more.")
    if not 100 <= highest <= 6000:
        raise InputError(f"--highest {highest:g} makes no sense.", "Give between 100 and 6000 cm^-1.")


def check_unit(unit: str) -> None:
    """Refuse an energy unit that is neither meV nor cm^-1."""
    if unit not in ("", "meV", "cm^-1"):
        raise InputError(f"--experiment-unit {unit!r} makes no sense.", "Give meV or cm^-1.")


def isotopes(given: Sequence[str]) -> dict[str, str | float]:
    """``H=D`` and ``H=7.64`` as {label: isotope or barn}."""
    chosen: dict[str, str | float] = {}
    for text in given:
        label, equals, what = text.partition("=")
        if not (equals and label.strip() and what.strip()):
            raise InputError(f"--isotope {text} makes no sense.", "Write H=D, O=O18 or H=7.64.")
        try:
            chosen[label.strip()] = float(what)
        except ValueError:
            chosen[label.strip()] = what.strip()
    return chosen


def charges(given: str) -> dict[str, float]:
    """``O=-0.82,H=0.41`` as {label: charge in e}."""
    chosen: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in given.split(","))):
        label, _, number = part.partition("=")
        try:
            chosen[label.strip()] = float(number)
        except ValueError:
            raise InputError(f"--charges {given} makes no sense.", "Write O=-0.82,H=0.41.") from None
    return chosen


def laser(nanometres: float | None) -> float | None:
    """Wavenumber of a laser [cm^-1]."""
    if nanometres is None:
        return None
    if not 100 < nanometres < 10000:
        raise InputError(f"--laser {nanometres:g} makes no sense.", "Give a wavelength in nm, such as 532.")
    return 1e7 / nanometres


def groups(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``methyl=0,1,4-7`` as {name: atom numbers from 0}."""
    chosen: dict[str, tuple[int, ...]] = {}
    for text in given:
        name, equals, atoms = text.partition("=")
        wrong = InputError(
            f"--group {text} makes no sense.", "Write NAME=0,1,4-7 with atoms counted from 0, each once."
        )
        numbers: list[int] = []
        for part in atoms.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise wrong
            if int(last or first) > 10**7:
                raise wrong
            numbers += range(int(first), int(last or first) + 1)
        if (
            not equals
            or not name.strip()
            or not numbers
            or len(set(numbers)) < len(numbers)
            or name in chosen
        ):
            raise wrong
        chosen[name.strip()] = tuple(numbers)
    return chosen
