"""Labelled frames for training: read, checked before any time is spent, and split honestly.

Frames of one run follow each other in time and are correlated; a random split would test a
network on the neighbours of what it has seen. So the last frames of every run are the test set,
those before them the validation set.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from nnqmd_server.errors import DataError
from nnqmd_server.training.frame_numbers import refuse

WANNIER_CENTROID = "wannier_centroid"
LABELS = ("energy", "forces", "stress")


@dataclass(frozen=True)
class Split:
    """Frame numbers of each set, counted from 0 and in the order of the file."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def read_frames(path: Path) -> list[Atoms]:
    """All frames of an extxyz file (energy eV, forces eV/Angstrom, stress eV/Angstrom^3 in ASE's sign).

    Centroids that are NaN on every atom, as `write_sets` writes for frames without, are none.
    """
    if not path.is_file():
        raise DataError(f"There is no data file {path}.", "Correct `data` (relative to the configuration).")
    try:
        frames = read(path, ":", format="extxyz")
    except (ValueError, KeyError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as extended XYZ: {error}",
            "Write it with ase.io.write(..., format='extxyz').",
        ) from error
    if not frames:
        raise DataError(f"{path} holds no frames.", "Give a file with labelled frames.")
    for frame in frames:
        if WANNIER_CENTROID in frame.arrays and np.isnan(frame.arrays[WANNIER_CENTROID]).all():
            del frame.arrays[WANNIER_CENTROID]
    return frames


def check(
    frames: Sequence[Atoms], elements: Sequence[str], carriers: Iterable[str] = (), optional: bool = False
) -> None:
    """Refuse frames that would spoil a training, all bad frames of a kind at once.

    Parameters
    ----------
    frames
        Labelled frames.
    elements
        Chemical symbols that the network will know.
    carriers
        Elements whose atoms carry a Wannier centroid; empty if none is trained.
    optional
        Some frames may have no centroids.

    Raises
    ------
    DataError
        Names the frames, counted from 0, and what to do.
    """
    carriers = tuple(carriers)
    refuse(
        [k for k, frame in enumerate(frames) if set(frame.get_chemical_symbols()) - set(elements)],
        f"elements other than {', '.join(elements)}",
        "Add them to `elements`, or remove these frames.",
    )
    refuse(
        [k for k, frame in enumerate(frames) if not frame.pbc.all() or frame.cell.rank < 3],
        "no periodic cell",
        "Put molecules into a periodic box; stress and neighbour lists need one.",
    )
    for label in LABELS:
        refuse(
            [k for k, frame in enumerate(frames) if label not in _results(frame)],
            f"no {label}",
            "Label these frames, or remove them. extxyz needs the keys energy, forces and stress.",
        )
    if carriers:
        without = [k for k, frame in enumerate(frames) if WANNIER_CENTROID not in frame.arrays]
        refuse(
            [] if optional and len(without) < len(frames) else without,
            f"no {WANNIER_CENTROID}",
            "Add this array (3 columns, Angstrom, relative to its atom), or remove the section `wannier`; "
            "with `wannier.optional: true` some frames may be without.",
        )
    refuse(
        [k for k, frame in enumerate(frames) if not _all_finite(frame, carriers)],
        "numbers that are NaN or infinite",
        "Look at the calculations behind these frames; label them again or remove them.",
    )
    refuse(
        _duplicates(frames),
        "the same structure as an earlier frame",
        "Remove the repeats: they would stand in the training and the test set at once.",
    )


def filter_forces(frames: Sequence[Atoms], max_force: float | None) -> tuple[list[int], list[int]]:
    """Frame numbers with forces up to ``max_force`` [eV/Angstrom], and those above it."""
    largest = [float(np.linalg.norm(frame.get_forces(), axis=1).max()) for frame in frames]
    limit = np.inf if max_force is None else max_force
    kept = [k for k, force in enumerate(largest) if force <= limit]
    if not kept:
        raise DataError(
            f"No frame has all forces below max_force = {max_force} eV/Angstrom.", "Raise `max_force`."
        )
    return kept, [k for k, force in enumerate(largest) if force > limit]


def outliers(frames: Sequence[Atoms], ratio: float = 2.0) -> dict[int, float]:
    """Frames whose largest force stands out: frame number -> that force [eV/Angstrom].

    A frame stands out if its largest force is ``ratio`` times the 90th percentile of all frames' largest.
    """
    largest = np.array([np.linalg.norm(frame.get_forces(), axis=1).max() for frame in frames])
    limit = ratio * np.percentile(largest, 90)
    return {int(k): float(largest[k]) for k in np.flatnonzero(largest > limit)}


def split(groups: Sequence[str], validation: float, test: float, join_below: int = 0) -> Split:
    """Chronological split of every group: first training, then validation, then test.

    Groups that are too short to be split one by one are taken together; their test and validation frames
    are spread evenly over them, so that every group with some frames has its share.

    Parameters
    ----------
    groups
        The run each frame belongs to, in the order of the file (which is the order in time).
    validation, test
        Fraction of each run; rounded to whole frames, at least one frame of each.
    join_below
        Groups of fewer frames are taken together.

    Raises
    ------
    DataError
        If a run is too short to give all three.
    """
    train_set, validation_set, test_set = [], [], []
    sizes = Counter(groups)
    joined = [k for k, name in enumerate(groups) if sizes[name] < join_below]
    runs = {name: [k for k, other in enumerate(groups) if other == name] for name in sizes}
    together = f"all runs of fewer than {join_below} frames"
    wholes = {name: members for name, members in runs.items() if sizes[name] >= join_below}
    for group, members in (wholes | ({together: joined} if joined else {})).items():
        n_test = max(1, round(test * len(members)))
        n_validation = max(1, round(validation * len(members)))
        n_train = len(members) - n_test - n_validation
        if n_train < 1:
            raise DataError(
                f"The run {group!r} has {len(members)} frames: too few for training, validation and test.",
                "Add frames to this run, take short runs together with `split.join_below: 8`, or set "
                "`split.group` to a key that joins runs.",
            )
        if group == together:
            members = _spread(members, n_train, n_validation, n_test)
        train_set += members[:n_train]
        validation_set += members[n_train : n_train + n_validation]
        test_set += members[n_train + n_validation :]
    return Split(tuple(sorted(train_set)), tuple(sorted(validation_set)), tuple(sorted(test_set)))


def _spread(members: Sequence[int], n_train: int, n_validation: int, n_test: int) -> list[int]:
    """Reordered so that the last ``n_test``, and the ``n_validation`` before them, lie evenly spread."""
    test = [members[int((k + 0.5) * len(members) / n_test)] for k in range(n_test)]
    rest = [k for k in members if k not in set(test)]
    validation = [rest[int((k + 0.5) * len(rest) / n_validation)] for k in range(n_validation)]
    train = [k for k in rest if k not in set(validation)]
    assert len(train) == n_train
    return [*train, *validation, *test]


def groups_of(frames: Sequence[Atoms], key: str) -> list[str]:
    """The run of every frame: ``frame.info[key]``; without that key all frames are one run."""
    missing = [k for k, frame in enumerate(frames) if key not in frame.info]
    if missing and len(missing) < len(frames):
        refuse(missing, f"no {key!r}", "Name the run of every frame, or of none.")
    return [str(frame.info.get(key, "all")) for frame in frames]


def prepare(frame: Atoms, carriers: Iterable[str] = (), group: str = "config_type") -> Atoms:
    """A frame with the labels that nequip is to see, the run it belongs to, and nothing else.

    Other keys go: nequip would take ``dipole``, ``charges`` and the like as its own fields.
    Atoms that carry no centroid, or have no label of it, get NaN, which the loss leaves out.
    """
    bare = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=True)
    bare.info = {k: frame.info[k] for k in (group, "source_id") if k in frame.info}
    results = _results(frame)
    bare.calc = SinglePointCalculator(bare, **{label: results[label] for label in LABELS})
    carriers = tuple(carriers)
    if carriers:
        given = frame.arrays.get(WANNIER_CENTROID, np.full((len(frame), 3), np.nan))
        centroids = np.array(given, dtype=float)
        centroids[~np.isin(frame.get_chemical_symbols(), carriers)] = np.nan
        bare.set_array(WANNIER_CENTROID, centroids)
    return bare


def write_sets(
    frames: Sequence[Atoms],
    parts: Split,
    directory: Path,
    carriers: Iterable[str] = (),
    group: str = "config_type",
) -> None:
    """Write train.xyz, val.xyz and test.xyz into a directory."""
    carriers = tuple(carriers)
    for name, members in (("train", parts.train), ("val", parts.validation), ("test", parts.test)):
        prepared = [prepare(frames[k], carriers, group) for k in members]
        write(directory / f"{name}.xyz", prepared, format="extxyz")


def _results(frame: Atoms) -> Mapping[str, np.ndarray]:
    return frame.calc.results if frame.calc is not None else {}


def _all_finite(frame: Atoms, carriers: tuple[str, ...]) -> bool:
    results = _results(frame)
    arrays = [frame.positions, frame.cell.array, *(np.asarray(results[label]) for label in LABELS)]
    if carriers and WANNIER_CENTROID in frame.arrays:
        arrays.append(frame.arrays[WANNIER_CENTROID][np.isin(frame.get_chemical_symbols(), carriers)])
    return all(np.isfinite(array).all() for array in arrays)


def _duplicates(frames: Sequence[Atoms]) -> list[int]:
    seen: set[str] = set()
    repeated = []
    for k, frame in enumerate(frames):
        content = [frame.numbers, np.round(frame.positions, 5) + 0.0, np.round(frame.cell.array, 5) + 0.0]
        digest = hashlib.sha256(
            b"".join(np.ascontiguousarray(part).tobytes() for part in content)
        ).hexdigest()
        if digest in seen:
            repeated.append(k)
        seen.add(digest)
    return repeated
