"""Whether a run is a solid or a liquid."""

from __future__ import annotations

import numpy as np

from nnqmd_server.spectra.series import Velocities
from nnqmd_server.spectra.trajectory import Trajectory, masses_of

POINTS = 2048
"""Points of a path that `looks_liquid` keeps at most."""


def looks_liquid(run: Trajectory | Velocities, skip: float = 0.0) -> tuple[bool, str]:
    """Whether the slowest-moving element diffuses, and the numbers that say so.

    The mean square displacement of a solid levels off, that of a liquid grows in proportion to time.
    Called a liquid when it grows by more than half between a quarter and a half of the run, to more
    than 1 Angstrom^2. The heaviest element is asked, since light atoms of turning molecules travel
    without diffusing. Its velocities are integrated block by block.
    """
    masses = masses_of(run.symbols)
    heavy = np.flatnonzero(masses == masses.max())
    if isinstance(run, Velocities):
        chosen = run.after(skip) if skip else run
        n_frames, blocks = len(chosen.velocities), iter([chosen.velocities[:, heavy]])
    else:
        n_frames = run.about_frames
        blocks = (block.mean for block in run.of_atoms(heavy).blocks(skip=skip))
    every = max(1, n_frames // POINTS)
    path, place, count = [], np.zeros((len(heavy), 3)), 0
    for velocities in blocks:
        way = place + np.cumsum(velocities, axis=0) * run.interval
        path.append(way[(-count) % every :: every])
        place, count = way[-1], count + len(way)
    points = np.concatenate(path)
    quarter = len(points) // 4
    early, late = (
        float(((points[k:] - points[: len(points) - k]) ** 2).sum(axis=-1).mean())
        for k in (quarter, 2 * quarter)
    )
    name = run.symbols[int(heavy[0])]
    time = quarter * every * run.interval
    numbers = (
        f"<dr^2> of {name} is {early:.3g} A^2 after {time:.0f} fs and {late:.3g} A^2 after {2 * time:.0f} fs"
    )
    return bool(late > 1.0 and late > 1.5 * early), numbers
