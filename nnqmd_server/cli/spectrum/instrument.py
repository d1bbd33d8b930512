"""Options of neutron instruments."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnqmd_server.errors import InputError

if TYPE_CHECKING:
    from nnqmd_server.spectra.instruments import Instrument

PANEL = "Instrument"


class Name(StrEnum):
    """Instruments with their own settings."""

    vision = "vision"
    tosca = "tosca"
    sequoia = "sequoia"
    arcs = "arcs"
    direct = "direct"


NameOption = Annotated[
    Name,
    typer.Option(
        "--instrument",
        help="vision, tosca: both banks; sequoia, arcs, or any direct geometry: with --ei",
        rich_help_panel=PANEL,
    ),
]
Ei = Annotated[
    float | None,
    typer.Option("--ei", help="incident energy in meV, for direct geometry", rich_help_panel=PANEL),
]
Angles = Annotated[
    tuple[float, float] | None,
    typer.Option(
        help="smallest and largest scattering angle in degrees, for direct geometry; the instrument's own by "
        "default",
        rich_help_panel=PANEL,
    ),
]
Resolution = Annotated[
    str,
    typer.Option(
        help="for direct geometry: full width at half maximum in meV, a file of energy transfers and full "
        "widths in meV, or resins (the package's model, the default)",
        rich_help_panel=PANEL,
    ),
]
Chopper = Annotated[
    float | None, typer.Option(help="chopper frequency in Hz, for resins", rich_help_panel=PANEL)
]
ChopperPackage = Annotated[
    str, typer.Option(help="chopper package, for resins, such as High-Flux", rich_help_panel=PANEL)
]


def chosen(
    name: Name,
    ei: float | None,
    angles: tuple[float, float] | None,
    resolution: str,
    chopper: float | None,
    chopper_package: str,
) -> Instrument:
    """The instrument that these options describe."""
    from nnqmd_server.spectra.instruments import TOSCA, VISION, direct

    if name in (Name.vision, Name.tosca):
        given = [
            text
            for text, value in (("--ei", ei), ("--angles", angles), ("--resolution", resolution))
            if value
        ]
        if given:
            raise InputError(
                f"{given[0]} has no meaning for {name.upper()}, whose final energy and angles are fixed.",
                "Leave it out, or choose --instrument sequoia, arcs or direct.",
            )
        return {Name.vision: VISION, Name.tosca: TOSCA}[name]
    if ei is None:
        raise InputError(
            f"{name.upper()} needs an incident energy.", "Give it in meV with --ei, for example --ei 500."
        )
    if name == Name.direct and not (angles and resolution):
        raise InputError(
            "A spectrometer of your own needs its angles and its resolution.",
            "Give --angles 3 135 and --resolution 5 (meV, full width) or a file.",
        )
    try:
        width: str | float | Path = float(resolution)
    except ValueError:
        width = resolution or "resins"
    settings: dict[str, float | str] = {}
    if chopper is not None:
        settings["chopper_frequency"] = chopper
    if chopper_package:
        settings["chopper_package"] = chopper_package
    title = "direct geometry" if name == Name.direct else name.upper()
    return direct(title, ei, width, angles, **settings)
