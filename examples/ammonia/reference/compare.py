"""Models against CP2K: lattice constant, pressure and phonons of phase I; vibrations of the molecule.

python examples/ammonia/reference/compare.py small=MODEL.nequip.zip other=OTHER.nequip.zip --figure out.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import quantities
from ase import Atoms
from ase.io import read
from matplotlib.figure import Figure

from nnqmd_server.labels.frames import labelled
from nnqmd_server.potentials.load import load, parse_models
from nnqmd_server.spectra.output import pictures
from nnqmd_server.structures import Array, from_ase

HERE = Path(__file__).resolve().parent
BANDS = {
    "lattice": slice(0, 21),
    "umbrella": slice(21, 25),
    "bending": slice(25, 33),
    "stretching": slice(33, 45),
}
"""Of the 45 modes of phase I, rising: 9 translations and 12 librations, then those within molecules."""


@dataclass(frozen=True)
class Measured:
    """All that is compared, of the reference or of a model; what was not computed is None."""

    lattice: quantities.Lattice | None
    phonons: Array | None
    molecule: Array | None
    bond: float = np.nan
    angle: float = np.nan


def model_evaluate(source: str | Path) -> quantities.Evaluate:
    """A model as an evaluator; a file in double precision, for the finite differences."""
    potential = load(f"{source}@float64" if Path(source).is_file() else str(source), compiled=False)

    def evaluate(atoms: Atoms) -> Atoms:
        results = potential.evaluate(from_ase([atoms]))
        stress = -results.virial[0] / atoms.get_volume()
        return labelled(atoms, float(results.energy[0]), results.forces, stress, {}, ("a model", 0))

    return evaluate


def measured(phase1: Sequence[Atoms], phonons: Sequence[Atoms], molecule: Sequence[Atoms]) -> Measured:
    """Numbers from labelled frames; what there are no frames for is left out."""
    return Measured(
        quantities.lattice_of(phase1) if len(phase1) > 1 else None,
        quantities.phonon_wavenumbers(phonons) if phonons else None,
        quantities.molecule_wavenumbers(molecule) if len(molecule) > 1 else None,
        molecule[0].get_distance(0, 1) if molecule else np.nan,
        molecule[0].get_angle(1, 0, 2) if molecule else np.nan,
    )


def reference_frames() -> dict[str, list[Atoms]]:
    """What CP2K has computed (the files beside this one); a file that is not there yet is an empty list."""
    files = {name: HERE / f"{name}.xyz" for name in ("phase1", "phonons", "molecule")}
    return {name: read(file, ":", parallel=False) if file.is_file() else [] for name, file in files.items()}


def reference() -> Measured:
    """What CP2K says."""
    return measured(**reference_frames())


def of_model(source: str | Path) -> Measured:
    """The same with a model, at the model's own minima, as far as there is a reference."""
    evaluate = model_evaluate(source)
    there = reference_frames()
    constants = [frame.cell[0, 0] for frame in there["phase1"]]
    molecule = quantities.molecule if len(there["molecule"]) > 1 else _molecule_at_rest
    return measured(
        quantities.phase1(evaluate, evaluate, constants),
        quantities.phonons(evaluate, evaluate) if there["phonons"] else [],
        molecule(evaluate, evaluate) if there["molecule"] else [],
    )


def _molecule_at_rest(evaluate: quantities.Evaluate, guide: quantities.Evaluate) -> list[Atoms]:
    return [quantities.relaxed_molecule(evaluate, guide)]


def rows(found: Mapping[str, Measured]) -> list[list[str]]:
    """The table, a row for each quantity, a column for each of ``found``; the first is the reference."""
    said = list(found.values())

    def row(name: str, unit: str, digits: int, value: Callable[[Measured], float]) -> list[str]:
        return [name, unit, *(f"{value(one):.{digits}f}" for one in said)]

    table = []
    if said[0].lattice is not None:
        table.append(row("lattice constant, zero pressure", "A", 3, lambda one: one.lattice.from_pressure))
        if np.isfinite(said[0].lattice.from_energy):
            table.append(row("lattice constant, lowest energy", "A", 3, lambda one: one.lattice.from_energy))
            table.append(row("bulk modulus", "GPa", 1, lambda one: one.lattice.bulk_modulus))
        for k, a in enumerate(said[0].lattice.constants):
            table.append(row(f"pressure at {a:.2f} A", "GPa", 2, lambda one, k=k: one.lattice.pressure[k]))
        for k, a in enumerate(said[0].lattice.constants):
            table.append(row(f"N-H at {a:.2f} A", "A", 4, lambda one, k=k: one.lattice.bond[k]))
            table.append(row(f"H-N-H at {a:.2f} A", "degree", 2, lambda one, k=k: one.lattice.angle[k]))
        for k, a in enumerate(said[0].lattice.constants):
            table.append(row(f"energy at {a:.2f} A", "meV/atom", 2, lambda one, k=k: one.lattice.energy[k]))
    if said[0].phonons is not None:
        table += [_phonon_row(name, part, said) for name, part in BANDS.items()]
    if said[0].molecule is not None:
        for k, mode in {0: "a1 umbrella", 1: "e bending", 3: "a1 stretching", 4: "e stretching"}.items():
            table.append(row(f"molecule, {mode}", "1/cm", 0, lambda one, k=k: one.molecule[k]))
    if np.isfinite(said[0].bond):
        table.append(row("molecule, N-H", "A", 4, lambda one: one.bond))
        table.append(row("molecule, H-N-H", "degree", 2, lambda one: one.angle))
    return table


def _phonon_row(name: str, part: slice, said: Sequence[Measured]) -> list[str]:
    truth = said[0].phonons[part]
    apart = [one.phonons[part] - truth for one in said[1:]]
    texts = [f"{truth.min():.0f} to {truth.max():.0f}"]
    return [f"phonons, {name}", "1/cm", *texts, *(f"{d.mean():+.0f} +- {d.std():.0f}" for d in apart)]


def draw(path: Path, found: Mapping[str, Measured]) -> None:
    """Energy and pressure of phase I against its lattice constant, and vibrations against the reference's."""
    truth = next(iter(found.values()))
    vibrations = truth.phonons is not None or truth.molecule is not None
    with pictures.style():
        figure = Figure(figsize=(15.6 if vibrations else 9.2, 4.4), layout="constrained")
        energy, pressure, *rest = figure.subplots(1, 3 if vibrations else 2)
        for k, (name, one) in enumerate(found.items()):
            colour, marker = ("0.15", "s") if k == 0 else (pictures.COLOURS[k - 1], "o")
            line = {"color": colour, "ms": 4, "label": name}
            if one.lattice is not None:
                energy.plot(one.lattice.constants, one.lattice.energy, f"-{marker}", **line)
                pressure.plot(one.lattice.constants, one.lattice.pressure, f"-{marker}", **line)
            for modes in rest if k and truth.phonons is not None else ():
                off = one.phonons - truth.phonons
                modes.plot(truth.phonons, off, "o", color=colour, ms=4, lw=0, label=f"{name}, phase I")
            for modes in rest if k and truth.molecule is not None else ():
                off = one.molecule - truth.molecule
                modes.plot(
                    truth.molecule, off, "D", color=colour, ms=6, mfc="none", label=f"{name}, molecule"
                )
        energy.set(xlabel="lattice constant (Å)", ylabel="energy above the minimum (meV/atom)")
        pressure.set(xlabel="lattice constant (Å)", ylabel="pressure (GPa)")
        for modes in rest:
            modes.set(xlabel="wavenumber by CP2K (cm$^{-1}$)", ylabel="model minus CP2K (cm$^{-1}$)")
        for axes, letter in zip((energy, pressure, *rest), "abc", strict=False):
            if letter != "a":
                axes.axhline(0, color="0.6", lw=0.8, zorder=0)
            axes.set_title(letter, loc="left", weight="bold")
            if axes in rest:  # points are everywhere
                axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
            else:
                axes.legend()
        below = "phase I with relaxed positions" + ("; vibrations" if vibrations else "")
        pictures.headline(figure, "Ammonia: models against CP2K", below)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="[NAME=]MODEL", help="as for nnqmd serve")
    parser.add_argument("--figure", type=Path, help="picture to draw (.png, .svg)")
    options = parser.parse_args()
    found = {"CP2K": reference()}
    for name, source in parse_models(options.models).items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        found[name] = of_model(source)
    print(f"| quantity | unit | {' | '.join(found)} |\n|{'---|' * (len(found) + 2)}")
    for row in rows(found):
        print(f"| {' | '.join(row)} |")
    if found["CP2K"].phonons is not None:
        print("Phonons of a model: its own minus CP2K's, mean and standard deviation over the modes.")
    if options.figure:
        draw(options.figure, found)


if __name__ == "__main__":
    main()
