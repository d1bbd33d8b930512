"""``nnqmd dipole``: dipoles of a trajectory, after the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnqmd_server.cli.spectrum import words
from nnqmd_server.cli.terminal import console
from nnqmd_server.errors import InputError

EXAMPLES = """
Examples:

  nnqmd dipole runs/ammonia/simulation.pos_00.xyz --beads --model ammonia-small.nequip.zip --timestep 0.5

  nnqmd dipole md.traj --interval 2.0 --model ammonia-small.nequip.zip --out md-dipoles.h5

  nnqmd spectrum ir md-dipoles.h5 --temperature 300
      the infrared spectrum of it

  nnqmd dipole dump.lammpstrj --unit metal --elements N,H --timestep 0.5 --model m.nequip.zip --born
"""


def dipole(
    trajectory: Annotated[
        Path, typer.Argument(help="positions: xyz, pdb, LAMMPS, ASE or HDF5", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="a model that gives dipoles", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="the file; dipoles.h5 beside the trajectory if not given", show_default=False),
    ] = None,
    beads: Annotated[
        bool, typer.Option("--beads", help="the trajectory is one of i-PI's bead files: read them all")
    ] = False,
    timestep: Annotated[
        float | None, typer.Option(help="simulation time step in fs, where the file has step numbers")
    ] = None,
    interval: Annotated[
        float | None, typer.Option(help="time between frames in fs, where the file has no step numbers")
    ] = None,
    unit: Annotated[
        str, typer.Option(help="unit of the positions, or LAMMPS' unit style, where unsaid")
    ] = "",
    cell_unit: Annotated[str, typer.Option(help="unit of the cell, where unsaid")] = "",
    elements: Annotated[str, typer.Option(help="elements of LAMMPS' types: N,H")] = "",
    skip: Annotated[float, typer.Option(help="time at the beginning to leave out, in fs", min=0.0)] = 0.0,
    drop_cut: Annotated[
        bool, typer.Option("--drop-cut", help="leave out a last frame that is cut off")
    ] = False,
    born: Annotated[
        bool, typer.Option("--born", help="write Born charges dM/dR too (runs the model uncompiled)")
    ] = False,
    molecules: Annotated[
        bool, typer.Option("--molecules", help="write the dipole of every molecule too")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    batch: Annotated[int, typer.Option(help="structures evaluated together", min=1)] = 64,
) -> None:
    """Dipoles of every frame by a model, into a file that `nnqmd spectrum ir` reads."""
    from nnqmd_server.potentials import allegro
    from nnqmd_server.potentials.load import load
    from nnqmd_server.spectra.predicted_dipoles import write_dipoles
    from nnqmd_server.spectra.trajectory import open_beads, open_trajectory

    if (timestep is not None and not timestep > 0) or (interval is not None and not interval > 0):
        raise InputError("A time between frames must be positive.", "Give it in fs.")
    opened = (open_beads if beads else open_trajectory)(
        trajectory,
        timestep=timestep,
        interval=interval,
        unit=unit or None,
        cell_unit=cell_unit or None,
        symbols=tuple(elements.split(",")) if elements else (),
        unwrap=True,
        drop_cut=drop_cut,
    )
    target = out or trajectory.parent / "dipoles.h5"
    if target.exists() and out is None:
        raise InputError(f"{target} exists.", "Say with --out where the dipoles should go.")
    with console.status(f"Loading {model}"):
        potential = allegro.load(model, device, born=True) if born else load(model, device)
    with words.progress("dipoles") as tell:
        frames = write_dipoles(target, opened, potential, batch, skip, born, molecules, tell)
    for warning in opened.warnings:
        console.print(f"[yellow]note:[/] {warning}")
    console.print(
        f"{frames} frames of {opened.n_beads} bead(s), one every {opened.interval:g} fs,"
        f" by {potential.card.name} ({potential.form})"
    )
    console.print(f"wrote [bold]{target}[/]; next: nnqmd spectrum ir {target} --temperature KELVIN")
