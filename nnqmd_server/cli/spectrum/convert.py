"""``nnqmd spectrum convert``: trajectories into one compact file, or into what OCLIMAX reads."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnqmd_server.cli.spectrum import options, sources, words
from nnqmd_server.cli.spectrum import options as o
from nnqmd_server.cli.terminal import console
from nnqmd_server.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnqmd_server.spectra.trajectory import Trajectory
    from nnqmd_server.structures import Array

EXAMPLES = """
Examples:

  nnqmd spectrum convert runs/ammonia
      writes runs/ammonia/trajectory.h5, which the spectrum commands then read instead of the text

  nnqmd spectrum convert runs/ammonia --to oclimax --out for-oclimax
      writes velocity.dump (centroid velocities) and out.params, and says what to type next
"""


class To(StrEnum):
    """What comes out."""

    hdf5 = "hdf5"
    oclimax = "oclimax"


def convert(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder that `nnqmd run` made, or a trajectory")],
    to: Annotated[
        To, typer.Option(help="hdf5: our own compact file; oclimax: LAMMPS velocities and parameters")
    ] = To.hdf5,
    out: Annotated[
        Path | None, typer.Option(help="hdf5: the file, RUN/trajectory.h5 by default; oclimax: the folder")
    ] = None,
    temperature: o.Temperature = None,
    skip: o.Skip = 0.0,
    timestep: o.Timestep = None,
    interval: o.Interval = None,
    unit: o.Unit = "",
    elements: o.Elements = "",
    drop_cut: o.DropCut = False,
) -> None:
    """Read the text of a trajectory once and keep it as HDF5, or hand it over to OCLIMAX."""
    options.check(temperature, skip=skip)
    reading = sources.Reading(temperature, timestep, interval, unit, elements, drop_cut)
    if to == To.hdf5:
        # a conversion needs no temperature
        opened, _ = sources.open_runs(
            [run], sources.Reading(temperature or 1.0, timestep, interval, unit, elements, drop_cut)
        )
        words.wrote([_to_hdf5(opened[0], out)])
        return
    opened, kelvin = sources.open_runs([run], reading)
    words.wrote(_to_oclimax(opened[0], kelvin, skip, out))


def _to_hdf5(run: sources.Run, out: Path | None) -> Path:
    from nnqmd_server.spectra.store import convert as store

    path = out or (run.path / sources.CONVERTED if run.plan else run.path.with_suffix(".h5"))
    if not run.plan and path == run.path:
        raise DataError(f"{path} would replace itself.", "Give another name with --out.")
    with words.progress("converting") as tell:
        return store(sources.all_trajectories(run), path, tell)


def _to_oclimax(run: sources.Run, kelvin: float, skip: float, out: Path | None) -> list[Path]:
    from nnqmd_server.spectra.output.files import make_folder
    from nnqmd_server.spectra.output.oclimax import export_velocities

    folder = out or sources.output_folder([run], None) / "oclimax"
    trajectory = sources.velocities(run)
    make_folder(folder)
    with words.progress("writing velocities") as tell:
        written = export_velocities(folder, trajectory.symbols, _frames(trajectory, skip, tell), kelvin)
    console.print("next, with OCLIMAX:")
    console.print(f"  oclimax convert -lt velocity.dump {trajectory.interval:g}")
    console.print("  oclimax run out.tclimax out.params")
    return written


def _frames(
    trajectory: Trajectory, skip: float, tell: Callable[[float], None]
) -> Iterator[tuple[int, Array, Array]]:
    for block in trajectory.blocks(skip=skip, progress=tell):
        if block.cells is None:
            raise DataError(
                f"{trajectory.path} has no cell.", "OCLIMAX's input needs one; a molecule in a box will do."
            )
        yield from zip(block.steps.tolist(), block.mean, block.cells, strict=True)
