"""CP2K as a code that labels, and one structure through it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms

from nnqmd_server.errors import DataError, ProgramError
from nnqmd_server.labels import centres, cp2k_output
from nnqmd_server.labels.cp2k_input import forces_input, wannier_input
from nnqmd_server.labels.frames import bad_frame, labelled

STRIDES = (2, 1)
"""Of the cube files; the second where the first does not divide CP2K's grid."""


@dataclass(frozen=True)
class Cp2k:
    """CP2K: one run for energy, forces and stress, and one at Gamma for Wannier centres.

    Parameters
    ----------
    command : tuple of str
        How CP2K is started; ``-i FILE -o FILE`` is added.
    version : str
        As the program says it.
    forces, wannier : str
        Input templates; an empty ``wannier`` leaves the centres out.
    k_length : float or None
        See `nnqmd_server.labels.cp2k_input.with_k_points`.
    carriers : tuple of str
        Elements that centres belong to; empty for all but hydrogen.
    timeout : float
        Of one run [s].
    threads : int
        OMP_NUM_THREADS of CP2K.
    """

    command: tuple[str, ...]
    version: str
    forces: str
    wannier: str
    k_length: float | None
    carriers: tuple[str, ...] = ()
    timeout: float = 3600.0
    threads: int = 1

    @property
    def name(self) -> str:
        """Code and version."""
        return f"CP2K {self.version}"

    def identity(self, atoms: Atoms) -> str:
        """The inputs as CP2K would get them, and how centres are made of the output."""
        both = inputs(atoms, self.forces, self.wannier, self.k_length, STRIDES[0])
        return json.dumps([self.name, *both, [centres.ESTIMATOR, *self.carriers] if self.wannier else None])

    def settings(self) -> dict[str, Any]:
        """For the provenance file."""
        return {
            "command": shlex.join(self.command),
            "k_length": self.k_length,
            "carriers": list(self.carriers),
            "forces_input": self.forces,
            "wannier_input": self.wannier,
        }

    def prepare(self) -> Callable[[Atoms, Path], Atoms]:
        """Make the labeller."""
        return lambda atoms, folder: label(atoms, folder, self)


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
