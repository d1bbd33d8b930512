"""Trajectories, read as a stream: centroid or bead files of i-PI, LAMMPS dumps, ASE's, and our own HDF5.

Units are read from the files and never guessed; where a file is silent the caller must say it, and where
both speak they must agree. Nothing but the head of a file is read before somebody asks for its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.beads import bead_files
from nnqmd_server.spectra.readers import streams, units
from nnqmd_server.spectra.readers.opening import open_source
from nnqmd_server.spectra.readers.source import Frames, Source
from nnqmd_server.spectra.readers.unwrapping import Unwrapping
from nnqmd_server.spectra.series import Positions, Velocities, check_enough

Array = np.ndarray
Progress = Callable[[float], None]

BLOCK_BYTES = 1 << 24
"""Size of a block of frames when the caller leaves it to us."""


@dataclass(frozen=True)
class Block:
    """Frames that follow each other.

    Parameters
    ----------
    first : int
        Number of the first of them, counted from the first frame after the skip.
    steps : Array
        Molecular-dynamics steps, int64, shape (n,).
    values : Array
        Positions [Angstrom], velocities [Angstrom/fs] or charges [e], shape (n, n_beads, n_atoms, 3).
    cells : Array or None
        Cell vectors as rows [Angstrom], shape (n, 3, 3); None without a periodic cell.
    """

    first: int
    steps: Array
    values: Array
    cells: Array | None

    @property
    def mean(self) -> Array:
        """Average over the beads, shape (n, n_atoms, 3)."""
        return self.values[:, 0] if self.values.shape[1] == 1 else self.values.mean(axis=1)


@dataclass(frozen=True)
class Trajectory:
    """A trajectory on disk whose head has been read; make one with `open_trajectory` or `open_beads`.

    Parameters
    ----------
    sources : tuple of Source
        One file, or one for each bead.
    quantity : str
        i-PI's name: positions, velocities, x_centroid, v_centroid, becx, becy, becz.
    interval : float
        Time between frames [fs].
    scale : float
        From the file's unit to Angstrom, Angstrom/fs or e.
    cell_scale : float or None
        From the cell's unit to Angstrom; None when it is neither known nor needed.
    unwrap : bool
        Whether positions that were put back into the cell are followed through its boundary.
    drop_cut : bool
        Whether a last frame that not all files have whole is left out.
    atoms : Array or None
        Which atoms are read; None for all.
    """

    sources: tuple[Source, ...]
    quantity: str
    interval: float
    scale: float
    cell_scale: float | None
    unwrap: bool = False
    drop_cut: bool = False
    atoms: Array | None = None

    @property
    def path(self) -> Path:
        """The file, or that of the first bead."""
        return self.sources[0].path

    @property
    def kind(self) -> str:
        """What it is: "positions", "velocities" or "charges"."""
        return units.KINDS[self.quantity]

    @property
    def symbols(self) -> tuple[str, ...]:
        """Atom labels, length n_atoms."""
        every = self.sources[0].symbols
        return every if self.atoms is None else tuple(every[k] for k in self.atoms)

    @property
    def n_atoms(self) -> int:
        """Atoms that are read."""
        return len(self.sources[0].symbols) if self.atoms is None else len(self.atoms)

    @property
    def n_beads(self) -> int:
        """Beads, 1 for a centroid."""
        return len(self.sources) * self.sources[0].n_beads

    @property
    def n_frames(self) -> int | None:
        """How many frames there are, or None when only reading would tell (text)."""
        return self.sources[0].n_frames

    @property
    def about_frames(self) -> int:
        """How many frames there are; for text estimated from the size of the file and its first frame."""
        source = self.sources[0]
        return source.about if source.n_frames is None else source.n_frames

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was tolerated; complete when the last block has been read."""
        return tuple(dict.fromkeys(w for source in self.sources for w in source.warnings))

    def of_atoms(self, indices: Sequence[int] | Array) -> Trajectory:
        """The same trajectory of some atoms only (from HDF5, only these are read)."""
        chosen = np.asarray(indices, dtype=np.intp)
        return replace(self, atoms=chosen if self.atoms is None else self.atoms[chosen])

    def blocks(
        self, n_frames: int | None = None, skip: float = 0.0, progress: Progress | None = None
    ) -> Iterator[Block]:
        """Iterate over the frames; only one block is in memory.

        Parameters
        ----------
        n_frames : int, optional
            Frames in a block (the last one may have fewer); about 16 MB by default.
        skip : float
            Time at the beginning to leave out [fs].
        progress : callable, optional
            Called with the fraction read.

        Raises
        ------
        DataError
            A frame that is cut off, not finite, of other atoms, at an uneven step, or wrapped into the
            cell; bead files that do not belong together.
        """
        if not skip >= 0:
            raise DataError(f"A skip of {skip:g} fs makes no sense.", "Give a time in fs, 0 or more.")
        size = n_frames or max(1, BLOCK_BYTES // (24 * self.n_beads * self.n_atoms))
        left_out = int(np.ceil(skip / self.interval - 1e-9))
        unwrapping = Unwrapping(self.path, self.unwrap) if self.kind == "positions" else None
        streamed = [
            streams.even(source, streams.regrouped(source, size, self.atoms)) for source in self.sources
        ]
        count, ended = 0, False
        for given in zip_longest(*streamed):
            parts = self._together(given, count, self.drop_cut and not ended)
            ended = not parts or len(parts[0].steps) < max(len(g.steps) for g in given if g)
            if not parts:
                continue
            # joining also makes the copy that may be changed
            values = np.concatenate([p.values for p in parts], axis=1) * self.scale
            self._check_finite(values, count)
            cells = _periodic(parts[0].cells, self.cell_scale)
            if unwrapping is not None and cells is not None:
                unwrapping.follow(values, cells, count)
            if progress is not None:
                progress(min(1.0, parts[0].done))
            start = min(max(0, left_out - count), len(values))
            before = max(0, count - left_out)
            count += len(values)
            if start < len(values):
                yield Block(
                    before, parts[0].steps[start:], values[start:], None if cells is None else cells[start:]
                )
        if count <= left_out:
            raise DataError(
                f"Skipping {skip:g} fs leaves nothing of {self.path}, which has {count} frames, one every "
                f"{self.interval:g} fs.",
                "Skip less, or run longer.",
            )

    def load(self, skip: float = 0.0, progress: Progress | None = None) -> Velocities | Positions:
        """Everything in memory, beads averaged.

        Raises
        ------
        DataError
            As `blocks`; also fewer than `MINIMUM_FRAMES` frames.
        """
        blocks = [(b.steps, b.mean, b.cells) for b in self.blocks(skip=skip, progress=progress)]
        steps = np.concatenate([b[0] for b in blocks])
        check_enough(self.path, len(steps))
        values = np.concatenate([b[1] for b in blocks])
        if self.kind == "velocities":
            return Velocities(self.symbols, values, steps, self.interval, self.quantity, self.warnings)
        cells = None if blocks[0][2] is None else np.concatenate([b[2] for b in blocks])
        return Positions(self.symbols, values, steps, self.interval, self.quantity, cells, self.warnings)

    def _together(self, parts: Sequence[Frames | None], count: int, drop: bool) -> list[Frames]:
        """The beads' frames, which must be at the same steps."""
        nothing = np.empty(0, dtype=np.int64)
        steps = [nothing if part is None else part.steps for part in parts]
        short = min(map(len, steps))
        if drop and max(map(len, steps)) == short + 1:
            # a kill between two files of one frame
            self.sources[0].warnings.append(f"the last frame of {self.path.name} was left out")
            parts = [part and streams.part_of(part, 0, short) for part in parts]
            steps = [s[:short] for s in steps]
            if short == 0:
                return []
        for source, theirs in zip(self.sources[1:], steps[1:], strict=True):
            if len(theirs) != len(steps[0]) or (theirs != steps[0]).any():
                short = min(len(theirs), len(steps[0]))
                apart = np.flatnonzero(theirs[:short] != steps[0][:short])
                frame = count + (int(apart[0]) if len(apart) else short)
                raise DataError(
                    f"Frame {frame} of {source.path} is not at the step of the same frame of {self.path}, "
                    "or only one of the two has it.",
                    "All bead files must be of one run; if it was killed, cut all to the same length.",
                )
        return [part for part in parts if part is not None]

    def _check_finite(self, values: Array, count: int) -> None:
        if np.isfinite(values.sum()):  # one pass; a sum that overflows is looked into as well
            return
        bad = ~np.isfinite(values)
        if bad.any():
            frame, bead, atom, _ = np.argwhere(bad)[0]
            name = self.sources[bead].path if len(self.sources) > 1 else self.path
            raise DataError(
                f"Frame {count + frame} of {name} holds a value of atom {atom} that is not finite.",
                "The run has failed there: look at its energies, shorten the time step or mend the model.",
            )


def open_trajectory(
    path: str | Path | Sequence[str | Path],
    timestep: float | None = None,
    interval: float | None = None,
    quantity: str | None = None,
    unit: str | None = None,
    cell_unit: str | None = None,
    symbols: Sequence[str] = (),
    unwrap: bool = False,
    drop_cut: bool = False,
) -> Trajectory:
    """Open a trajectory; the format is seen from the file itself.

    Parameters
    ----------
    path : path, or sequence of paths
        xyz, extended xyz or pdb (i-PI), LAMMPS dump, ASE ``.traj`` or our HDF5; several paths are the
        beads of one run, in order (`open_beads` finds them).
    timestep : float, optional
        Simulation time step [fs], where the file has step numbers.
    interval : float, optional
        Time between frames [fs], where it has none.
    quantity, unit, cell_unit : str, optional
        What the file holds and in which units, where it does not say so itself. For LAMMPS, ``unit`` is
        the unit style. ``quantity`` also chooses where a file holds several.
    symbols : sequence of str
        Elements of LAMMPS' types 1, 2, ...
    unwrap : bool
        Follow atoms that were put back into the cell.
    drop_cut : bool
        Leave out a last frame that is cut off, with a warning, instead of an error.

    Raises
    ------
    DataError
        Missing or empty file, unknown format, missing or contradicting unit or time.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(p) for p in path]
    if not paths:
        raise DataError("No trajectory was given.", "Name at least one file.")
    sources = tuple(open_source(p, quantity or "", unit or "", tuple(symbols), drop_cut) for p in paths)
    first = sources[0]
    for source in sources[1:]:
        alike = ("symbols", "quantity", "unit", "cell_unit", "has_steps")
        for name in alike:
            if getattr(source, name) != getattr(first, name):
                raise DataError(
                    f"{source.path} differs from {first.path} in its {name.replace('_', ' ')}.",
                    "All bead files must be of one run.",
                )
    what = units.quantity_of(first, quantity or "")
    kind = units.KINDS[what]
    scale = units.factor(first.path, what, kind, first.unit, "" if first.scaled else unit or "", "unit")
    cell_scale = None
    if first.cell_unit or cell_unit or (kind == "positions" and streams.has_cell(first)):
        given = "" if first.scaled else cell_unit or ""
        cell_scale = units.factor(first.path, "cell", "positions", first.cell_unit, given, "cell_unit")
    return Trajectory(
        sources, what, streams.interval_of(first, timestep, interval), scale, cell_scale, unwrap, drop_cut
    )


def open_beads(path: str | Path, n_beads: int | None = None, **options: Any) -> Trajectory:
    """Open all bead files of a run, which i-PI numbers: ``simulation.pos_00.xyz`` and so on.

    Parameters
    ----------
    path : path
        Any one of them, or their name without the number (``simulation.pos.xyz``, ``simulation.pos``).
    n_beads : int, optional
        How many there must be. Without it a missing last bead cannot be noticed.
    **options
        As for `open_trajectory`.

    Raises
    ------
    DataError
        As `open_trajectory`; no bead file, or one is missing.
    """
    return open_trajectory(bead_files(Path(path), n_beads), **options)


def masses_of(symbols: tuple[str, ...]) -> Array:
    """Masses that i-PI gives to these labels [amu], shape (n_atoms,).

    A ``<masses>`` override in the i-PI input is not seen here.
    """
    from ipi.utils.units import Elements

    masses = {}
    for symbol in dict.fromkeys(symbols):
        try:
            masses[symbol] = Elements.mass_list[symbol]
        except KeyError as error:
            raise DataError(
                f"i-PI knows no atom called {symbol!r}.", "Use element symbols (D and T for heavy hydrogen)."
            ) from error
    return np.array([masses[s] for s in symbols])


def _periodic(cells: Array | None, scale: float | None) -> Array | None:
    """Cells in Angstrom; None where there is none: i-PI writes negative ones, ASE zeros."""
    if cells is None or scale is None or not (np.linalg.det(cells) > 0).all():
        return None
    return cells * scale
