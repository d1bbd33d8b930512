"""One structure through CP2K."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ase import Atoms

from nnqmd_server.errors import DataError, ProgramError
from nnqmd_server.labels import centres, cp2k_output
from nnqmd_server.labels.cp2k_input import forces_input, wannier_input
from nnqmd_server.labels.frames import bad_frame, labelled

if TYPE_CHECKING:
    from nnqmd_server.labels.codes import Cp2k

STRIDES = (2, 1)
"""Of the cube files; the second where the first does not divide CP2K's grid."""


def inputs(atoms: Atoms, forces: str, wannier: str, k_length: float | None, stride: int) -> tuple[str, str]:
    """Both inputs of a structure; the second is "" without centres."""
    return (
        forces_input(forces, atoms, "forces", k_length),
        wannier_input(wannier, atoms, "wannier", stride) if wannier else "",
    )


def version(command: tuple[str, ...]) -> str:
    """What ``cp2k --version`` says.

    Raises
    ------
    ProgramError
        It does not start, or is not CP2K.
    """
    try:
        said = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramError(f"{command[0]} does not start: {error}.", "Try it by hand.") from error
    found = re.search(r"CP2K version (\S.*)", said.stdout)
    if not found:
        raise ProgramError(
            f"{command[0]} --version does not say its version.", "Say how CP2K is started with --command."
        )
    return found[1].strip()


def label(atoms: Atoms, folder: Path, code: Cp2k) -> Atoms:
    """Energy, forces, stress and (with a template for them) Wannier centres of one structure.

    Raises
    ------
    DataError, ProgramError
        A run failed; its files are in the folder.
    """
    start = time.monotonic()
    forces, wannier = inputs(atoms, code.forces, code.wannier, code.k_length, STRIDES[0])
    if not atoms.pbc.all():
        raise DataError(
            f"{atoms.get_chemical_formula()} is not periodic in all directions.",
            "Put molecules into a periodic box of at least 10 Angstrom.",
        )
    output = cp2k_output.read_output(_run(code, folder, "forces", forces), len(atoms))
    if output.forces is None:
        raise bad_frame(folder / "forces.out", 0, "has no forces", "Use RUN_TYPE ENERGY_FORCE.")
    frame = labelled(atoms, output.energy, output.forces, output.stress, {}, (folder, 0))
    if wannier:
        places = _centres(atoms, folder, code, wannier)
        centres.add_centres(frame, places, code.carriers, (folder, 0))
    frame.info["label_seconds"] = round(time.monotonic() - start, 1)
    return frame


def _centres(atoms: Atoms, folder: Path, code: Cp2k, text: str) -> centres.Array:
    for stride in STRIDES:
        (folder / "wannier-wan.xyz").unlink(missing_ok=True)  # CP2K would append
        given = text if stride == STRIDES[0] else wannier_input(code.wannier, atoms, "wannier", stride)
        cp2k_output.check_localisation(_run(code, folder, "wannier", given))
        cubes = cp2k_output.cubes_beside(folder, "wannier-*_w*.cube")
        printed = cp2k_output.printed_centres(folder / "wannier-wan.xyz", atoms)
        if len(cubes) != len(printed):
            raise bad_frame(
                folder, 0, f"has {len(printed)} centres but {len(cubes)} cube files", "Look into the folder."
            )
        try:
            places = centres.centres_of_cubes(cubes, atoms)
        except DataError:
            if stride == STRIDES[-1]:
                raise
            places = None  # the grid is odd: a second run writes all of it
        finally:
            for cube in cubes:
                cube.unlink()  # 1 to 20 MB each
        if places is not None:
            return places
    raise AssertionError("the last stride raises or returns")


def _run(code: Cp2k, folder: Path, name: str, text: str) -> Path:
    (folder / f"{name}.inp").write_text(text)
    out = folder / f"{name}.out"
    out.unlink(missing_ok=True)  # CP2K would append
    environment = dict(os.environ, OMP_NUM_THREADS=str(code.threads))
    with (folder / f"{name}.err").open("wb") as errors:
        try:
            ended = subprocess.run(
                [*code.command, "-i", f"{name}.inp", "-o", out.name],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
                timeout=code.timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ProgramError(
                f"CP2K took longer than {code.timeout:g} s for {name}.",
                "Raise --timeout, or use --workers less.",
            ) from error
    printed = cp2k_output.read_text(out) if out.exists() else ""
    if ended.returncode != 0 or not printed:
        why = cp2k_output.failure(printed) or _last_line(folder / f"{name}.err")
        raise ProgramError(
            f"CP2K ended with status {ended.returncode} on {name}.inp" + (f": {why}" if why else "."),
            f"Look at {name}.out in its folder.",
        )
    return out


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
