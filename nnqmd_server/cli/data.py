"""``nnqmd data``: labelled data sets of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnqmd_server.cli.terminal import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase import Atoms

    from nnqmd_server.labels.convert import Reading

app = typer.Typer(help="Labelled data sets: convert what other programs wrote.", no_args_is_help=True)

EXAMPLES = """
Examples:

  nnqmd data convert runs/*/vasprun.xml --out train.xyz

  nnqmd data convert calc/*.out --cubes '{stem}-locHOMO_w*.cube' --out train.xyz
      CP2K: energy, forces, stress, and Wannier centroids from the orbitals in the same folder

  nnqmd data convert deepmd/system.000 --elements "N H" --out train.xyz

  nnqmd data convert old.xyz --keys energy=E,forces=F --units energy=hartree,forces=hartree/bohr

  nnqmd data convert md/ --format dpdata:cp2k/aimd_output --out train.xyz
"""


@app.callback()
def _room() -> None:
    """Keep `convert` a command of its own: with one command alone typer would drop its name."""


@app.command("convert", epilog=EXAMPLES)
def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="FILES...", help="CP2K, VASP, DeePMD, extxyz, or what dpdata reads"),
    ],
    out: Annotated[Path, typer.Option(help="data set to write (extxyz)")] = Path("data.xyz"),
    form: Annotated[
        str,
        typer.Option(
            "--format", help="extxyz, cp2k, vasp, deepmd or dpdata:NAME; seen from the file if left out"
        ),
    ] = "",
    name: Annotated[
        str, typer.Option(help="name of the run (config_type); that of the file by default")
    ] = "",
    keys: Annotated[
        str, typer.Option(help="extxyz: other keys, energy=..,forces=..,stress=..,virial=..")
    ] = "",
    units: Annotated[
        str, typer.Option(help="extxyz: units, energy=..,forces=..,stress=..,virial=..,length=..")
    ] = "",
    elements: Annotated[
        str, typer.Option(help='sets without type_map.raw: elements of types 0, 1, ..., such as "N H"')
    ] = "",
    wannier: Annotated[
        str, typer.Option(help="CP2K: file of printed centres beside the output, such as '{stem}-wan.xyz'")
    ] = "",
    cubes: Annotated[
        str, typer.Option(help="CP2K: Wannier orbitals beside the output, '{stem}-locHOMO_w*.cube'")
    ] = "",
    carriers: Annotated[
        str, typer.Option(help='elements that carry Wannier centres, such as "N O"; all but H by default')
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="replace OUT")] = False,
) -> None:
    """Convert labelled frames into the extxyz of `nnqmd train`: eV, Angstrom, ASE's sign of stress."""
    from nnqmd_server.errors import OutputError
    from nnqmd_server.labels.convert import Reading
    from nnqmd_server.labels.extxyz import parse_keys, parse_units
    from nnqmd_server.labels.frames import write_frames

    if out.exists() and not force:
        raise OutputError(f"{out} is there already.", "Give another --out, or --force.")
    reading = Reading(
        form, name, parse_keys(keys), parse_units(units), _words(elements), wannier, cubes, _words(carriers)
    )
    frames = _read_with_bar(sources, reading)
    write_frames(out, frames)
    _show(out, frames, bool(wannier))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _read_with_bar(sources: Sequence[Path], reading: Reading) -> list[Atoms]:
    from rich.progress import Progress

    from nnqmd_server.labels.convert import read_files

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=len(sources))
        return read_files(sources, reading, lambda _: bar.advance(task))


def _show(out: Path, frames: Sequence[Atoms], printed: bool) -> None:
    import numpy as np
    from rich.table import Table

    from nnqmd_server.labels.frames import CENTROID, GROUP, has_stress

    table = Table(box=None, pad_edge=False)
    for column in ("run", "frames", "atoms", "eV/atom", "max eV/A", "stress", "centroids"):
        table.add_column(column, justify="left" if column == "run" else "right")
    groups: dict[str, list[Atoms]] = {}
    for frame in frames:
        groups.setdefault(str(frame.info[GROUP]), []).append(frame)
    for group, members in list(groups.items())[:30]:
        sizes = [len(frame) for frame in members]
        energies = [frame.get_potential_energy() / len(frame) for frame in members]
        largest = max(float(np.linalg.norm(frame.get_forces(), axis=1).max()) for frame in members)
        table.add_row(
            group,
            str(len(members)),
            f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}",
            f"{min(energies):.3f} to {max(energies):.3f}",
            f"{largest:.2f}",
            "yes" if all(map(has_stress, members)) else "no",
            "yes" if all(CENTROID in frame.arrays for frame in members) else "no",
        )
    console.print(table)
    if len(groups) > 30:
        console.print(f"and {len(groups) - 30} more runs")
    if not all(map(has_stress, frames)):
        console.print("note: frames without stress; `nnqmd train` needs one", style="yellow")
    if printed:
        console.print(
            "note: printed Wannier centres are biased in cells below about 15 Angstrom; --cubes are not",
            style="yellow",
        )
    console.print(f"wrote [bold]{out}[/]: {len(frames)} frames")
