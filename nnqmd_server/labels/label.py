"""From structures to a labelled data set, with a note of how it was made."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ase import Atoms

from nnqmd_server import __version__
from nnqmd_server.errors import OutputError
from nnqmd_server.labels.codes import Code
from nnqmd_server.labels.crew import Done, Job, label_all
from nnqmd_server.labels.frames import GROUP, SOURCE, has_stress, write_frames
from nnqmd_server.labels.store import Store, key_of


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Parameters
    ----------
    frames : tuple
        (key, structure) of every frame, in the order of the input, without repeats.
    repeats : int
        Structures left out because they are the same as an earlier one.
    ready, failed, todo : tuple of str
        Keys of frames labelled before, failed before, and left.
    """

    out: Path
    code: Code
    store: Store
    frames: tuple[tuple[str, Atoms], ...]
    repeats: int
    ready: tuple[str, ...]
    failed: tuple[str, ...]
    todo: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of it: the labelled frames, and (name of the frame, reason) for those that failed."""

    frames: tuple[Atoms, ...]
    failures: tuple[tuple[str, str], ...]
    missing: int


def work_folder(out: Path) -> Path:
    """Where frames are kept one by one until (and after) the data set is written."""
    return out.with_name(f"{out.stem}.work")


def plan(structures: Sequence[Atoms], code: Code, out: Path, retry: bool = False) -> Plan:
    """Look which frames are there.

    Parameters
    ----------
    structures : sequence of Atoms
        With ``config_type`` and ``source_id``.
    code : Code
        What labels them.
    out : Path
        The extxyz file to write.
    retry : bool
        Try frames again that failed before with the same settings.
    """
    if out.suffix not in {".xyz", ".extxyz"}:
        raise OutputError(f"{out} is not an extxyz file.", "Give a name that ends in .xyz.")
    store = Store(work_folder(out))
    store.make()
    frames: dict[str, Atoms] = {}
    for atoms in structures:
        frames.setdefault(key_of(code.identity(atoms)), atoms)
    ready = tuple(key for key in frames if store.has(key))
    missing = [key for key in frames if not store.has(key)]
    if retry:
        for key in missing:
            store.forget(key)
    failed = tuple(key for key in missing if store.reason(key) is not None)
    todo = tuple(key for key in missing if key not in set(failed))
    return Plan(out, code, store, tuple(frames.items()), len(structures) - len(frames), ready, failed, todo)


def run(
    work: Plan, workers: int, limit: float, keep: bool = False, tell: Callable[[Done], None] | None = None
) -> Outcome:
    """Label what is left and write the data set, also when this is interrupted.

    Raises
    ------
    OutputError
        The data set cannot be written.
    """
    structures = dict(work.frames)
    jobs = [Job(key, structures[key]) for key in work.todo]
    try:
        with contextlib.closing(label_all(jobs, work.code, work.store, workers, limit, keep)) as finished:
            for done in finished:
                if tell is not None:
                    tell(done)
    finally:
        outcome = collect(work)
    return outcome


def collect(work: Plan) -> Outcome:
    """Write all frames that are labelled, in the order of the input, and the note beside them."""
    frames, failures, missing = [], [], 0
    for key, structure in work.frames:
        reason = work.store.reason(key)
        if work.store.has(key):
            frame = work.store.get(key)
            # the same structure may go by another name than when it was labelled
            frame.info |= {name: structure.info[name] for name in (GROUP, SOURCE) if name in structure.info}
            frames.append(frame)
        elif reason is not None:
            failures.append((str(structure.info.get(SOURCE, key)), reason))
        else:
            missing += 1
    if frames:
        write_frames(work.out, frames)
        _write_note(work, frames, failures, missing)
    return Outcome(tuple(frames), tuple(failures), missing)


def note_path(out: Path) -> Path:
    """The note beside a data set."""
    return out.with_suffix(".json")


def _write_note(
    work: Plan, frames: Sequence[Atoms], failures: Sequence[tuple[str, str]], missing: int
) -> None:
    groups: dict[str, int] = {}
    for frame in frames:
        groups[str(frame.info.get(GROUP))] = groups.get(str(frame.info.get(GROUP)), 0) + 1
    note: dict[str, Any] = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "nnqmd_server": __version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "code": work.code.name,
        "settings": work.code.settings(),
        "units": {
            "energy": "eV",
            "forces": "eV/Angstrom",
            "stress": "eV/Angstrom^3, ASE's sign (positive under tension)",
            "wannier_centroid, wannier_centres": "Angstrom, relative to the carrier atom",
        },
        "frames": len(frames),
        "frames_by_run": groups,
        "without_stress": sum(not has_stress(frame) for frame in frames),
        "seconds": round(sum(float(frame.info.get("label_seconds", 0.0)) for frame in frames), 1),
        "not_labelled_yet": missing,
        "failed": [{"frame": name, "reason": reason} for name, reason in failures],
    }
    path = note_path(work.out)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(note, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}).", "Check the disk.") from error
