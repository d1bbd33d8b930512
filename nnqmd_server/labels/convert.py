"""Labelled frames of any program's files, in the form that ``nnqmd train`` reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ase import Atoms

from nnqmd_server.errors import DataError, InputError
from nnqmd_server.labels import centres, cp2k_output
from nnqmd_server.labels.extxyz import read_extxyz
from nnqmd_server.labels.frames import CENTROID
from nnqmd_server.labels.sets import deepmd_format, read_sets
from nnqmd_server.labels.vasp import read_vasp

FORMATS = ("extxyz", "cp2k", "vasp", "deepmd")


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Parameters
    ----------
    form : str
        One of `FORMATS`, ``dpdata:NAME``, or "" to see it from the file.
    group : str
        Name of the run; "" for that of the file.
    keys, units : mapping
        For extxyz; see `read_extxyz`.
    elements : tuple of str
        For sets without names; see `read_sets`.
    wannier, cubes : str
        Where the Wannier centres of a CP2K output are: a pattern in which ``{stem}`` is the output's name
        without ending, relative to its folder. ``wannier`` is a file of printed centres, ``cubes`` are the
        orbitals themselves, which are exact in small cells.
    carriers : tuple of str
        Elements that centres belong to; empty for all but hydrogen.
    """

    form: str = ""
    group: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict)
    elements: tuple[str, ...] = ()
    wannier: str = ""
    cubes: str = ""
    carriers: tuple[str, ...] = ()


def read_files(
    paths: Sequence[Path], reading: Reading, tell: Callable[[Path], None] | None = None
) -> list[Atoms]:
    """Labelled frames of some files or folders, in this order.

    Raises
    ------
    DataError
        A file or frame cannot be used; names it and what to do.
    InputError
        Options that do not belong together.
    """
    if reading.wannier and reading.cubes:
        raise InputError("Wannier centres were asked for in two ways.", "Use --cubes (exact) or --wannier.")
    frames: list[Atoms] = []
    for path in paths:
        frames += _read(path, reading)
        if tell is not None:
            tell(path)
    if not frames:
        raise DataError("No frames were found.", "Give files with labelled frames.")
    some = [k for k, frame in enumerate(frames) if CENTROID in frame.arrays]
    if some and len(some) < len(frames):
        lacking = next(k for k in range(len(frames)) if k not in set(some))
        raise DataError(
            f"{len(some)} of {len(frames)} frames have Wannier centres; frame {lacking} has none.",
            "Convert those with and those without into files of their own.",
        )
    return frames


def _read(path: Path, reading: Reading) -> list[Atoms]:
    form = reading.form or form_of(path)
    own = path.parent.resolve().name if path.name in {"OUTCAR", "vasprun.xml"} else path.stem
    group = reading.group or own
    if (reading.wannier or reading.cubes) and form != "cp2k":
        raise InputError(
            f"{path} is not an output of CP2K.", "--wannier and --cubes belong to CP2K's output."
        )
    if form == "extxyz":
        return read_extxyz(path, group, reading.keys, reading.units)
    if form == "vasp":
        return read_vasp(path, group)
    if form == "cp2k":
        frame = cp2k_output.read_cp2k(path, group)
        _add_centres(path, frame, reading)
        return [frame]
    if form == "deepmd":
        known = deepmd_format(path)
        if known is None:
            raise DataError(
                f"{path} is not a DeePMD system: it has no type.raw.", "Give the folder of one system."
            )
        return read_sets(path, group, known, reading.elements)
    if form.startswith("dpdata:"):
        return read_sets(path, group, form.removeprefix("dpdata:"), reading.elements)
    raise InputError(f"{form!r} is not a known format.", f"Use {', '.join(FORMATS)} or dpdata:NAME.")


def form_of(path: Path) -> str:
    """The format of a file or folder, seen from its contents.

    Raises
    ------
    DataError
        It is not there, or none of the known ones.
    """
    if not path.exists():
        raise DataError(f"There is no file or folder {path}.", "Check the path.")
    if deepmd_format(path):
        return "deepmd"
    head = ""
    if path.is_file():
        with path.open("rb") as stream:
            head = stream.read(65536).decode("utf-8", "replace")
    lines = head.splitlines()
    if "CP2K|" in head or "DBCSR|" in head:
        return "cp2k"
    if "<modeling>" in head or (lines and lines[0].strip().startswith("vasp.")):
        return "vasp"
    if (
        len(lines) > 1
        and lines[0].strip().isdigit()
        and ("Lattice=" in lines[1] or "Properties=" in lines[1])
    ):
        return "extxyz"
    raise DataError(
        f"{path} is no format that is seen by itself.",
        f"Say which it is with --format: {', '.join(FORMATS)} or dpdata:NAME.",
    )


def _add_centres(path: Path, frame: Atoms, reading: Reading) -> None:
    if reading.cubes:
        found = _beside(path, reading.cubes)
        places = centres.centres_of_cubes(found, frame)
    elif reading.wannier:
        found = _beside(path, reading.wannier)
        if len(found) != 1:
            raise DataError(
                f"{len(found)} files fit {reading.wannier!r} for {path}.", "One file has the centres."
            )
        places = cp2k_output.printed_centres(found[0], frame)
    else:
        return
    centres.add_centres(frame, places, reading.carriers, (path, 0))


def _beside(path: Path, pattern: str) -> Sequence[Path]:
    wanted = pattern.replace("{stem}", path.stem)
    found = cp2k_output.cubes_beside(path.parent, wanted)
    if not found:
        raise DataError(
            f"No file {wanted} is beside {path}.",
            "Give a pattern relative to the output, such as '{stem}-wan.xyz'.",
        )
    return found
