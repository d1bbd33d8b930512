"""The numbered files of the beads of a run."""

from __future__ import annotations

import re
from pathlib import Path

from nnqmd_server.errors import DataError

_NUMBERED = re.compile(r"(.+)_(\d+)((?:\.\w+)?)")


def bead_number(path: Path) -> int | None:
    """The number in a name such as ``simulation.pos_03.xyz``, or None."""
    found = _NUMBERED.fullmatch(path.name)
    return int(found[2]) if found else None


def bead_files(path: Path, n_beads: int | None = None) -> list[Path]:
    """The numbered files of all beads, in order; see `open_beads`."""
    numbered = _NUMBERED.fullmatch(path.name)
    stem, ending = (numbered[1], numbered[3]) if numbered else (path.name, "")
    patterns = [(stem, ending)]
    if not numbered:
        patterns += [(path.stem, path.suffix)]
    found: dict[int, Path] = {}
    for stem, ending in patterns:
        pattern = re.compile(re.escape(stem) + r"_(\d+)" + (re.escape(ending) if ending else r"(?:\.\w+)?"))
        for file in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
            number = pattern.fullmatch(file.name)
            if number and int(number[1]) in found:
                raise DataError(
                    f"Bead {int(number[1])} has two files, {found[int(number[1])]} and {file.name}.",
                    "Name one file with its ending, such as simulation.pos_00.xyz.",
                )
            if number:
                found[int(number[1])] = file
        if found:
            break
    if not found:
        raise DataError(
            f"There are no bead files like {path.with_name(f'{stem}_0{ending}')}.",
            "Check the path; i-PI writes one file per bead for positions and velocities.",
        )
    last = max(found) if n_beads is None else n_beads - 1
    missing = [k for k in range(last + 1) if k not in found]
    width = len(_NUMBERED.fullmatch(next(iter(found.values())).name)[2])  # type: ignore[index]
    if missing:
        name = path.with_name(f"{stem}_{missing[0]:0{width}d}{next(iter(found.values())).suffix}")
        raise DataError(
            f"The file of bead {missing[0]}, {name}, is missing; {len(found)} of {last + 1} are there.",
            "Bring all bead files together, or use a centroid trajectory (x_centroid, v_centroid).",
        )
    if n_beads is not None and max(found) >= n_beads:
        raise DataError(
            f"There is a file of bead {max(found)}, {found[max(found)]}, but {n_beads} beads were expected.",
            "Remove files of an older run with more beads.",
        )
    return [found[k] for k in sorted(found)]
