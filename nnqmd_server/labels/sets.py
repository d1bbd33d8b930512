"""DeePMD sets, and every other format that dpdata reads.

dpdata gives eV, Angstrom, eV/Angstrom and the virial in eV; virial = -V stress.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from nnqmd_server.errors import DataError, InputError, ProgramError
from nnqmd_server.labels.frames import GROUP, SOURCE, labelled


def deepmd_format(path: Path) -> str | None:
    """What dpdata calls the kind of DeePMD data at a path, or None."""
    if path.is_file():
        return "deepmd/hdf5" if path.suffix in {".hdf5", ".h5"} else None
    if not (path / "type.raw").is_file():
        return None
    sets = sorted(path.glob("set.*"))
    if not sets:
        return "deepmd/raw"
    return "deepmd/npy/mixed" if (sets[0] / "real_atom_types.npy").is_file() else "deepmd/npy"


def read_sets(path: Path, group: str, form: str, elements: tuple[str, ...] = ()) -> list[Atoms]:
    """All frames of a data set.

    Parameters
    ----------
    path : Path
        A DeePMD system, or what the format wants.
    group : str
        Name of the run.
    form : str
        dpdata's name of the format, such as ``deepmd/npy`` or ``cp2k/aimd_output``.
    elements : tuple of str
        Of types 0, 1, ... where the set has no ``type_map.raw``.

    Raises
    ------
    ProgramError
        dpdata is not installed.
    DataError
        dpdata cannot read it, labels are missing, or elements are not named.
    """
    frames = []
    for data in _load(path, form):
        names = _elements(path, list(data["atom_names"]), elements)
        numbers = np.array([chemical_symbols.index(name) for name in names])[data["atom_types"]]
        for name in ("energies", "forces"):
            if name not in data or len(data[name]) == 0:
                raise DataError(f"{path} has no {name}.", "Give a set with labels (energy.npy, force.npy).")
        pbc = not data.get("nopbc", False)
        for k in range(len(data["coords"])):
            atoms = Atoms(numbers, data["coords"][k], cell=data["cells"][k] if pbc else None, pbc=pbc)
            stress = None
            if pbc and "virials" in data:
                stress = -np.asarray(data["virials"][k]).reshape(3, 3) / atoms.get_volume()
            info = {GROUP: group, SOURCE: f"{group}_f{len(frames):06d}"}
            frames.append(
                labelled(
                    atoms, float(np.ravel(data["energies"])[k]), data["forces"][k], stress, info, (path, k)
                )
            )
    return frames


def _load(path: Path, form: str) -> list[dict[str, Any]]:
    try:
        import dpdata
    except ImportError as error:
        raise ProgramError("dpdata is not installed.", "pip install 'nnqmd-server[dpdata]'") from error
    try:
        if form.endswith("/mixed"):
            found = list(dpdata.MultiSystems.from_file(str(path), fmt=form).systems.values())
        else:
            found = [dpdata.LabeledSystem(str(path), fmt=form)]
    except NotImplementedError as error:
        raise InputError(f"dpdata has no format {form!r}.", "See its list of formats.") from error
    except (
        ValueError, KeyError, IndexError, OSError, RuntimeError, AssertionError, StopIteration, TypeError,
        PendingDeprecationWarning,
    ) as error:  # fmt: skip
        raise DataError(
            f"dpdata cannot read {path} as {form}: {type(error).__name__}: {error}.",
            "Check the path and --format.",
        ) from error
    if not any(len(system) for system in found):
        raise DataError(f"{path} holds no labelled frames for dpdata.", "Check the path and --format.")
    return [system.data for system in found]


def _elements(path: Path, names: list[str], given: tuple[str, ...]) -> list[str]:
    unnamed = [name for name in names if name not in chemical_symbols[1:]]
    if not unnamed:
        return names
    if len(given) != len(names) or any(name not in chemical_symbols[1:] for name in given):
        raise DataError(
            f"{path} does not say which elements its {len(names)} types are.",
            'Give them in order with --elements, such as "N H", or add type_map.raw.',
        )
    return list(given)
