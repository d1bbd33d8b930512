"""OCLIMAX's files: the column layout of its results, and what its ``convert`` reads.

OCLIMAX (Cheng et al., J. Chem. Theory Comput. 15, 1974 (2019); from trajectories: 16, 7702 (2020)) is a
closed program of Oak Ridge National Laboratory. What is written here follows its published results and
parameter files and the LAMMPS manual (``dump custom``); it was not run through OCLIMAX itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.output.files import whole_file
from nnqmd_server.spectra.output.labelled import Result

Array = np.ndarray

COLUMNS = " # deltaE,Total-backward,Total-forward,[backward 0-1 0-2 0-3 0-4+]"
"""The last line of the header."""


def write_oclimax(path: Path, result: Result) -> Path:
    """INS spectrum in the layout of OCLIMAX's csv files.

    Columns: energy transfer [cm^-1], loss only, the inelastic total of the backward and the forward bank, and
    the backward bank by order: one quantum, two, three, four and more, each by itself. As in OCLIMAX's own
    results the elastic line (order 0) is in none of the columns. Unit: ours, barn/(sr meV) per atom.

    Raises
    ------
    DataError
        The result does not come from two banks called backward and forward.
    """
    if not has_oclimax_layout(result):
        raise DataError(
            "OCLIMAX's layout has a backward and a forward bank; this spectrum has not.",
            "Use --instrument vision or tosca, or another --format.",
        )
    spectrum = result.data[0]
    columns = [spectrum.axes[0].values]
    columns += [
        sum(spectrum[f"order{n}_{bank}"].values for n in range(1, 5)) for bank in ("backward", "forward")
    ]
    columns += [spectrum[f"order{n}_backward"].values for n in range(1, 5)]
    kelvin = result.constants["T"].value
    instrument = 0 if "VISION" in result.settings.get("instrument", "") else 1
    header = (
        " # Key parameters for the calculation\n"
        " # TASK,INSTR,TEMP,WING,E_UNIT\n"
        f" # {0:4d},{instrument:4d},{kelvin:4.0f},{0:4d},{0:4d}\n{COLUMNS}\n"
    )
    with whole_file(path) as temporary, temporary.open("w", encoding="ascii") as file:
        file.write(header)
        for row in np.array(columns).T[columns[0] > 0]:
            file.write(",".join(f"{_fortran(x):>14s}" for x in row) + "\n")
    return path


def has_oclimax_layout(result: Result) -> bool:
    """Whether a result has the two banks of OCLIMAX's csv files."""
    names = {curve.name for curve in result.data[0].curves}
    return result.kind == "ins" and {"total_backward", "total_forward", "order4_backward"} <= names


def _fortran(x: float) -> str:
    """A number as Fortran's E14.6 writes it, 0.dddddde+xx, which is what the readers of these files met."""
    if x == 0 or not np.isfinite(x):
        return "0.000000E+00"
    exponent = int(np.floor(np.log10(abs(x)))) + 1
    mantissa = round(x / 10.0**exponent, 6)
    if abs(mantissa) >= 1:
        mantissa, exponent = mantissa / 10, exponent + 1
    return f"{mantissa:.6f}E{exponent:+03d}" if abs(exponent) < 100 else "0.000000E+00"


def write_velocity_dump(
    path: Path,
    symbols: tuple[str, ...],
    frames: Iterable[tuple[int, Array, Array]],
) -> int:
    """Velocities as a LAMMPS dump (``id type element vx vy vz``), for ``oclimax convert -lt``.

    Parameters
    ----------
    path : Path
        Where to.
    symbols : tuple of str
        Labels, length n_atoms.
    frames : iterable of (step, velocities, cell)
        Step number; velocities [Angstrom/fs], shape (n_atoms, 3); cell vectors as rows [Angstrom].
        They are turned into the orientation that LAMMPS demands, with a along x and b in the xy plane.

    Returns
    -------
    int
        How many frames were written.
    """
    types = {symbol: k for k, symbol in enumerate(dict.fromkeys(symbols), 1)}
    heads = [f"{i} {types[s]} {s} " for i, s in enumerate(symbols, 1)]
    count = 0
    with whole_file(path) as temporary, temporary.open("w", encoding="ascii") as file:
        for step, velocities, cell in frames:
            turned, box = lammps_orientation(cell, velocities)
            _dump_head(file, step, len(symbols), box)
            rows = (turned + 0.0).tolist()  # no -0.0
            file.writelines(
                f"{head}{x:.9g} {y:.9g} {z:.9g}\n" for head, (x, y, z) in zip(heads, rows, strict=True)
            )
            count += 1
    return count


def _dump_head(file: TextIO, step: int, n_atoms: int, box: Array) -> None:
    (xx, _, _), (xy, yy, _), (xz, yz, zz) = box.tolist()
    file.write(f"ITEM: TIMESTEP\n{step}\nITEM: NUMBER OF ATOMS\n{n_atoms}\n")
    if max(abs(xy), abs(xz), abs(yz)) < 1e-9 * xx:
        bounds = f"ITEM: BOX BOUNDS pp pp pp\n0 {xx:.9g}\n0 {yy:.9g}\n0 {zz:.9g}\n"
    else:  # LAMMPS writes the bounds of the box that encloses the tilted one
        x = (min(0, xy, xz, xy + xz), xx + max(0, xy, xz, xy + xz))
        y = (min(0, yz), yy + max(0, yz))
        bounds = (
            "ITEM: BOX BOUNDS xy xz yz pp pp pp\n"
            f"{x[0]:.9g} {x[1]:.9g} {xy:.9g}\n{y[0]:.9g} {y[1]:.9g} {xz:.9g}\n0 {zz:.9g} {yz:.9g}\n"
        )
    file.write(f"{bounds}ITEM: ATOMS id type element vx vy vz\n")


def lammps_orientation(cell: Array, vectors: Array) -> tuple[Array, Array]:
    """Vectors and cell turned so that a lies along x and b in the xy plane.

    Parameters
    ----------
    cell : Array
        Cell vectors as rows, right-handed, shape (3, 3).
    vectors : Array
        Shape (n, 3).

    Returns
    -------
    Array, Array
        The vectors and the cell (lower triangular, positive diagonal) in the new orientation.
    """
    if np.linalg.det(cell) <= 0:
        raise DataError(
            "The cell vectors are left-handed or have no volume; LAMMPS has no such box.",
            "Swap two cell vectors in the initial structure.",
        )
    q, r = np.linalg.qr(cell.T)  # cell = r.T q.T
    signs = np.sign(np.diag(r))
    return vectors @ (q * signs), (r * signs[:, None]).T


def write_parameters(path: Path, temperature: float, highest: float = 4000.0) -> Path:
    """A ``.params`` file for ``oclimax run``: VISION, incoherent approximation, energies in cm^-1.

    Parameters
    ----------
    path : Path
        Where to.
    temperature : float
        [K].
    highest : float
        Last energy transfer [cm^-1].
    """
    values = {
        "TASK": ("0", "incoherent approximation"),
        "INSTR": ("0", "VISION"),
        "TEMP": (f"{temperature:.2f}", "temperature [K]"),
        "E_UNIT": ("0", "energies in cm^-1"),
        "OUTPUT": ("0", "standard"),
        "MAXO": ("10", "highest order"),
        "CONV": ("2", "convolution from this order on"),
        "MINE": ("8.00", "first energy"),
        "MAXE": (f"{highest:.2f}", "last energy"),
        "dE": ("1.00", "energy step"),
        "ECUT": ("8.000", "modes below are left out"),
        "ERES": ("0.25E+01  0.50E-02  0.10E-06", "sigma of the resolution: coefficients of 1, E, E^2"),
        "THETA": ("135.0  45.0", "scattering angles [degree]"),
        "Ef": ("32.00", "final energy"),
        "WING": ("0", "no phonon wings added"),
    }
    with whole_file(path) as temporary:
        temporary.write_text(
            "".join(f"{name:8s}= {value}  # {meaning}\n" for name, (value, meaning) in values.items()),
            encoding="ascii",
        )
    return path


def export_velocities(
    folder: Path,
    symbols: tuple[str, ...],
    frames: Iterable[tuple[int, Array, Array]],
    temperature: float,
) -> list[Path]:
    """Everything that OCLIMAX needs, in one folder: ``velocity.dump`` and ``out.params``.

    Parameters
    ----------
    folder : Path
        Where to.
    symbols, frames
        As in `write_velocity_dump`.
    temperature : float
        [K].

    Returns
    -------
    list of Path
        What was written. Next come ``oclimax convert -lt velocity.dump DT`` with the time between frames
        in fs, and ``oclimax run out.tclimax out.params``.
    """
    dump = folder / "velocity.dump"
    write_velocity_dump(dump, symbols, frames)
    params = write_parameters(folder / "out.params", temperature)
    return [dump, params]
