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
    """All that is compared, of the reference or of a model."""

    lattice: quantities.Lattice
    phonons: Array
    molecule: Array
    bond: float
    angle: float


def model_evaluate(source: str | Path) -> quantities.Evaluate:
    """A model as an evaluator; a file in double precision, for the finite differences."""
    potential = load(f"{source}@float64" if Path(source).is_file() else str(source), compiled=False)

    def evaluate(atoms: Atoms) -> Atoms:
        results = potential.evaluate(from_ase([atoms]))
        stress = -results.virial[0] / atoms.get_volume()
        return labelled(atoms, float(results.energy[0]), results.forces, stress, {}, ("a model", 0))

    return evaluate


def measured(phase1: Sequence[Atoms], phonons: Sequence[Atoms], molecule: Sequence[Atoms]) -> Measured:
    """Numbers from labelled frames."""
    return Measured(
        quantities.lattice_of(phase1),
        quantities.phonon_wavenumbers(phonons),
        quantities.molecule_wavenumbers(molecule),
        molecule[0].get_distance(0, 1),
        molecule[0].get_angle(1, 0, 2),
    )


def reference() -> Measured:
    """What CP2K said (the files beside this one)."""
    return measured(
        *(read(HERE / f"{name}.xyz", ":", parallel=False) for name in ("phase1", "phonons", "molecule"))
    )


def of_model(source: str | Path) -> Measured:
    """The same with a model, at the model's own minima."""
    evaluate = model_evaluate(source)
    return measured(
        *(make(evaluate, evaluate) for make in (quantities.phase1, quantities.phonons, quantities.molecule))
    )


def rows(found: Mapping[str, Measured]) -> list[list[str]]:
    """The table, a row for each quantity, a column for each of ``found``; the first is the reference."""
    said = list(found.values())
    truth = said[0]

    def row(name: str, unit: str, digits: int, value: Callable[[Measured], float]) -> list[str]:
        return [name, unit, *(f"{value(one):.{digits}f}" for one in said)]

    def off(name: str, part: slice) -> list[str]:
        apart = [one.phonons[part] - truth.phonons[part] for one in said]
        texts = [f"{truth.phonons[part].min():.0f} to {truth.phonons[part].max():.0f}"]
        texts += [f"{d.mean():+.0f} +- {d.std():.0f}" for d in apart[1:]]
        return [f"phonons, {name}", "1/cm", *texts]

    table = [
        row("lattice constant, lowest energy", "A", 3, lambda one: one.lattice.from_energy),
        row("lattice constant, zero pressure", "A", 3, lambda one: one.lattice.from_pressure),
        row("bulk modulus", "GPa", 1, lambda one: one.lattice.bulk_modulus),
    ]
    for k, a in enumerate(quantities.LATTICE):
        table.append(row(f"pressure at {a:.2f} A", "GPa", 2, lambda one, k=k: float(one.lattice.pressure[k])))
    for k, a in enumerate(quantities.LATTICE):
        table.append(
            row(f"energy at {a:.2f} A", "meV/atom", 2, lambda one, k=k: float(one.lattice.energy[k]))
        )
    table += [off(name, part) for name, part in BANDS.items()]
    for k, mode in {0: "a1 umbrella", 1: "e bending", 3: "a1 stretching", 4: "e stretching"}.items():
        table.append(row(f"molecule, {mode}", "1/cm", 0, lambda one, k=k: float(one.molecule[k])))
    table.append(row("molecule, N-H", "A", 4, lambda one: one.bond))
    table.append(row("molecule, H-N-H", "degree", 2, lambda one: one.angle))
    return table


def draw(path: Path, found: Mapping[str, Measured]) -> None:
    """Energy and pressure of phase I against its lattice constant, and its phonons."""
    a = np.array(quantities.LATTICE)
    with pictures.style():
        figure = Figure(figsize=(13.8, 4.4), layout="constrained")
        energy, pressure, modes = figure.subplots(1, 3)
        for k, (name, one) in enumerate(found.items()):
            colour, marker = ("0.15", "s") if k == 0 else (pictures.COLOURS[k - 1], "o")
            energy.plot(a, one.lattice.energy, f"-{marker}", color=colour, ms=4, label=name)
            pressure.plot(a, one.lattice.pressure, f"-{marker}", color=colour, ms=4, label=name)
            if k:
                truth = next(iter(found.values())).phonons
                modes.plot(
                    truth, one.phonons - truth, marker, color=colour, ms=4, alpha=0.8, lw=0, label=name
                )
        energy.set(xlabel="lattice constant (Å)", ylabel="energy above the minimum (meV/atom)")
        pressure.set(xlabel="lattice constant (Å)", ylabel="pressure (GPa)")
        modes.set(xlabel="phonon of the reference (cm$^{-1}$)", ylabel="model minus reference (cm$^{-1}$)")
        for axes in (pressure, modes):
            axes.axhline(0, color="0.6", lw=0.8, zorder=0)
        for axes, letter in zip((energy, pressure, modes), "abc", strict=True):
            axes.set_title(letter, loc="left", weight="bold")
            axes.legend()
        pictures.headline(
            figure, "Ammonia, phase I: models against CP2K", "positions relaxed; phonons at Gamma"
        )
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
    print("Phonons of a model: its own minus the reference's, mean and standard deviation over the modes.")
    if options.figure:
        draw(options.figure, found)


if __name__ == "__main__":
    main()
