"""The model card: what a packaged model is, what it was trained on, and how wrong it is."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read
from nequip.model.saved_models.load_utils import load_saved_model

from nnqmd_server import __version__
from nnqmd_server.potentials.allegro import load
from nnqmd_server.training.accuracy import errors_on
from nnqmd_server.training.config import SplitChoice, TrainingConfig
from nnqmd_server.training.data import groups_of
from nnqmd_server.training.progress import Epoch
from nnqmd_server.units import GPA

SETS = {"test": "test.xyz", "validation": "val.xyz", "train": "train.xyz"}
ALWAYS_NOT_FOR = (
    "Elements, molecules, phases, densities and reactions that are not in the training data: "
    "a neural network extrapolates without warning.",
    "Anything beyond the cutoff: the network is strictly local and knows no long-range electrostatics "
    "or dispersion.",
)


def build_card(
    config: TrainingConfig,
    directory: Path,
    package: Path,
    epochs: Sequence[Epoch],
    data_files: Sequence[Mapping[str, str]],
    frame_numbers: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Everything the card says, as plain JSON types; every error is computed here from the package.

    Parameters
    ----------
    config
        The training that was run.
    directory
        Run directory with train.xyz, val.xyz and test.xyz.
    package
        The packaged model.
    epochs
        The log of the training.
    data_files
        Name (``file``) and hash (``sha256``) of each data file.
    frame_numbers
        Frames in each set, counted from 0 through all files.
    """
    potential = load(package, compiled=False)
    sets = {name: read(directory / file, ":") for name, file in SETS.items()}
    errors = {
        name: errors_on(potential, frames, groups_of(frames, config.split.group))
        for name, frames in sets.items()
    }
    best = min(epochs, key=lambda epoch: epoch.score)
    return {
        "model": {
            "file": package.name,
            "sha256": potential.card.sha256,
            "bytes": package.stat().st_size,
            "parameters": _parameter_count(package),
            "elements": list(potential.card.elements),
            "cutoff_A": potential.card.cutoff,
            "precision": potential.card.dtype,
            "gives": ["energy", "forces", "stress", *potential.card.properties],
            "ion_charges_e": potential.card.ion_charges,
            "carriers": potential.card.carriers,
        },
        "errors": errors,
        "data": {
            "files": list(data_files),
            "frames": {name: list(numbers) for name, numbers in frame_numbers.items()},
            "split": _split_in_words(config.split),
            "range": {name: _range(frames) for name, frames in sets.items()},
        },
        "training": {
            "method": "sharpness-aware minimisation" if config.training.rho > 0 else "plain minimisation",
            "epochs": len(epochs),
            "packaged_epoch": best.epoch,
            "seconds": round(epochs[-1].seconds, 1),
            "settings": _settings(config),
        },
        "versions": {
            "nnqmd-server": __version__,
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("torch", "nequip", "nequip-allegro", "e3nn", "lightning", "ase")
            },
        },
        "notes": list(config.notes),
        "not_for": [*config.not_for, *ALWAYS_NOT_FOR],
    }


def write_card(card: Mapping[str, Any], directory: Path) -> tuple[Path, Path]:
    """Write card.json and CARD.md into a directory."""
    machine, human = directory / "card.json", directory / "CARD.md"
    machine.write_text(json.dumps(card, indent=1) + "\n")
    human.write_text(as_markdown(card))
    return machine, human


def as_markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    model, training, data = card["model"], card["training"], card["data"]
    settings = training["settings"]
    lines = [
        f"# {model['file']}",
        "",
        f"Allegro network for {', '.join(model['elements'])} ({model['parameters']} parameters, cutoff "
        f"{model['cutoff_A']:g} A, {model['precision']}); gives {', '.join(model['gives'])}.",
        "`nnqmd train` wrote this page and computed every number in its tables from the packaged model; "
        "only the notes under Training and the limits at the end were written by hand.",
        "",
        "## Errors",
        "",
        "Test frames were never seen: neither trained on nor used to choose the epoch that was packaged. "
        "They are the last frames of the same runs, so they tell about interpolation, not about other "
        "phases. Training errors stand beside them to show how far the network knows its frames by heart.",
        "",
        *_error_table(card["errors"]),
        "",
        "mae and rmse are over Cartesian components; of centroids and dipoles, over the lengths of the error "
        "vectors. The last column is the rms of the test labels (of the energy: their standard deviation).",
        "",
        "Test errors of each run:",
        "",
        "| run | frames | energy mae (meV/atom) | forces rmse (meV/A) |",
        "|---|---|---|---|",
        *(
            f"| {run} | {e['frames']} | {e['energy_meV_per_atom']['mae']:.2f} "
            f"| {e['forces_meV_per_A']['rmse']:.0f} |"
            for run, e in card["errors"]["test"]["by_run"].items()
        ),
        "",
        "## Data",
        "",
        *(f"`{one['file']}`, sha256 `{one['sha256']}`." for one in data["files"]),
        f"Split {data['split']}.",
        "",
        "| set | frames | atoms per frame | rms force (eV/A) | largest force (eV/A) | density (atoms/A^3) "
        "| pressure (GPa) |",
        "|---|---|---|---|---|---|---|",
        *(_range_row(name, values) for name, values in data["range"].items()),
        "",
        "## Training",
        "",
        f"{training['method'].capitalize()}, rho = {settings['training']['rho']:g}; "
        f"{training['epochs']} epochs in {training['seconds'] / 60:.0f} min; the packaged weights are "
        f"the moving average after epoch {training['packaged_epoch'] + 1}, the best in validation.",
        "",
        *(f"- {note}" for note in card["notes"]),
        "",
        "```json",
        json.dumps(settings, indent=1),
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in card["versions"].items()) + ".",
        f"Model: {model['bytes']} bytes, sha256 `{model['sha256']}`.",
        "",
        "## Not for",
        "",
        *(f"- {limit}" for limit in card["not_for"]),
    ]
    return "\n".join(lines) + "\n"


def _split_in_words(choice: SplitChoice) -> str:
    said = "chronological within every run: the last frames are test, those before them validation"
    if choice.join_below:
        said += (
            f"; runs of fewer than {choice.join_below} frames together are one, whose test and validation "
            "frames are spread over it evenly, so these have neighbours of the same run among the others"
        )
    return said


def _error_table(errors: Mapping[str, Any]) -> list[str]:
    test, train = errors["test"], errors["train"]
    rows = [("energy", "meV/atom", test["energy_meV_per_atom"], train["energy_meV_per_atom"], 2)]
    rows.append(("forces", "meV/A", test["forces_meV_per_A"], train["forces_meV_per_A"], 1))
    by_element = "forces_by_element_meV_per_A"
    rows += [
        (f"forces on {s}", "meV/A", test[by_element][s], train[by_element][s], 1) for s in test[by_element]
    ]
    rows.append(("stress", "GPa", test["stress_GPa"], train["stress_GPa"], 3))
    if "wannier_centroid_A" in test:
        rows.append(("Wannier centroid", "A", test["wannier_centroid_A"], train["wannier_centroid_A"], 4))
        rows.append(("molecular dipole", "D", test["molecular_dipole_D"], train["molecular_dipole_D"], 3))
    return [
        "| quantity | unit | test mae | test rmse | train mae | train rmse | labels |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {unit} | {a['mae']:.{n}f} | {a['rmse']:.{n}f} | {b['mae']:.{n}f} "
            f"| {b['rmse']:.{n}f} | {a['label_rms']:.{n}f} |"
            for name, unit, a, b, n in rows
        ),
    ]


def _range(frames: Sequence[Atoms]) -> dict[str, Any]:
    """Range of the labels of a set: eV/Angstrom, atoms/Angstrom^3, GPa."""
    forces = np.concatenate([frame.get_forces() for frame in frames])
    pressures = [-np.trace(frame.get_stress(voigt=False)) / 3 / GPA for frame in frames]
    densities = [len(frame) / frame.get_volume() for frame in frames]
    sizes = [len(frame) for frame in frames]
    return {
        "frames": len(frames),
        "atoms_per_frame": [min(sizes), max(sizes)],
        "force_rms_eV_per_A": float(np.sqrt(np.mean(forces**2))),
        "force_max_eV_per_A": float(np.linalg.norm(forces, axis=1).max()),
        "density_atoms_per_A3": [min(densities), max(densities)],
        "pressure_GPa": [min(pressures), max(pressures)],
    }


def _range_row(name: str, r: Mapping[str, Any]) -> str:
    low, high = r["density_atoms_per_A3"]
    return (
        f"| {name} | {r['frames']} | {r['atoms_per_frame'][0]} to {r['atoms_per_frame'][1]} "
        f"| {r['force_rms_eV_per_A']:.2f} | {r['force_max_eV_per_A']:.1f} | {low:.3f} to {high:.3f} "
        f"| {r['pressure_GPa'][0]:.1f} to {r['pressure_GPa'][1]:.1f} |"
    )


def _settings(config: TrainingConfig) -> dict[str, Any]:
    """The configuration as plain types, files by their names alone."""
    plain = asdict(config)
    for key in ("notes", "not_for"):
        del plain[key]
    return json.loads(json.dumps(plain, default=lambda path: Path(path).name))


def _parameter_count(package: Path) -> int:
    model = load_saved_model(package)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
