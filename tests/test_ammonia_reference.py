"""The models that ship against the reference of CP2K that ships, and what the comparison is made of."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from ase.io import read, write
from conftest import MODEL, ROOT
from typer.testing import CliRunner

FOLDER = ROOT / "examples/ammonia/reference"


@pytest.fixture(scope="module")
def compare():
    sys.path.insert(0, str(FOLDER))
    try:
        import compare as module
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def evaluate(compare):
    return compare.model_evaluate(MODEL)


def test_symmetry_gives_what_moving_every_atom_gives(compare, evaluate, monkeypatch):
    q = compare.quantities
    monkeypatch.setattr(q, "STEP", 1e-3)  # moves of 0.03 A are large enough to break the symmetry by 0.2 %
    for frames, wavenumbers in (
        (q.molecule(evaluate, evaluate), q.molecule_wavenumbers),
        (q.phonons(evaluate, evaluate), q.phonon_wavenumbers),
    ):
        relaxed = frames[0]
        n = len(relaxed)
        columns = []
        for k in range(3 * n):
            up, down = (relaxed.copy() for _ in range(2))
            up.positions.ravel()[k] += q.STEP
            down.positions.ravel()[k] -= q.STEP
            columns.append((evaluate(down).get_forces() - evaluate(up).get_forces()).ravel() / (2 * q.STEP))
        masses = np.repeat(relaxed.get_masses(), 3)
        whole = np.array(columns)
        squares = np.linalg.eigvalsh((whole + whole.T) / 2 / np.sqrt(np.outer(masses, masses)))
        found = wavenumbers(frames)
        # eV/(A^2 amu) to (1/cm)^2; modes that leave the energy as it is stand below
        direct = np.sqrt(squares[-len(found) :]) * 521.47
        assert found == pytest.approx(direct, rel=1e-4, abs=0.1)


def test_the_model_stands_to_the_reference_as_the_docs_say(compare):
    reference, model = compare.reference(), compare.of_model(MODEL)
    assert reference.lattice.from_pressure == pytest.approx(5.092, abs=1e-3)
    assert model.lattice.from_pressure == pytest.approx(5.113, abs=2e-3)
    assert reference.lattice.bulk_modulus == pytest.approx(7.7, abs=0.1)
    assert model.lattice.bulk_modulus == pytest.approx(4.5, abs=0.2)
    assert reference.molecule[[0, 1, 3, 4]] == pytest.approx([1049, 1654, 3381, 3491], abs=1)
    assert model.molecule[[0, 1, 3, 4]] == pytest.approx([1048, 1586, 3347, 3443], abs=2)
    # Pairs that symmetry makes equal: what is left of the grid's noise.
    assert reference.molecule[[1, 4]] == pytest.approx(reference.molecule[[2, 5]], rel=0.01)
    assert reference.phonons[[0, 20, 21, 24, 25, 32, 33, 44]] == pytest.approx(
        [85, 598, 1111, 1133, 1629, 1693, 3276, 3399], abs=1
    )
    apart = model.phonons - reference.phonons
    means = [apart[band].mean() for band in compare.BANDS.values()]
    assert means == pytest.approx([0, 0, -43, -13], abs=2)
    assert reference.bond == pytest.approx(1.0208, abs=1e-4)
    assert model.bond == pytest.approx(1.0259, abs=2e-4)
    assert model.angle - reference.angle == pytest.approx(-1.30, abs=0.05)


def test_errors_of_a_model_on_new_frames_are_printed(evaluate, tmp_path):
    from nnqmd_server.cli import app

    # labels that are the model's own, one force wrong by 1 eV/A: 1 of 96 components
    frames = [evaluate(a) for a in read(FOLDER.parent / "data/ammonia_train.xyz", ":2", parallel=False)]
    frames[0].calc.results["forces"][3, 1] += 1.0
    for frame in frames:
        frame.set_array("wannier_centroid", np.zeros((len(frame), 3)))
    del frames[1].arrays["wannier_centroid"]
    write(tmp_path / "labels.xyz", frames, format="extxyz", parallel=False)
    json_file = tmp_path / "errors.json"
    args = [
        "model",
        "errors",
        f"mine={MODEL}",
        "--frames",
        str(tmp_path / "labels.xyz"),
        "--json",
        str(json_file),
    ]
    done = CliRunner().invoke(app, args, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    forces = json.loads(json_file.read_text())["mine"]["forces_meV_per_A"]
    assert forces["mae"] == pytest.approx(1000 / 96, abs=0.05)
    assert forces["rmse"] == pytest.approx(1000 / 96**0.5, abs=0.05)
    row = next(line for line in done.output.splitlines() if line.startswith("forces"))
    assert "10.4" in row and "102.1" in row


def test_the_frames_that_ship_differ_and_the_model_does_on_new_ones_what_the_docs_say():
    from nnqmd_server.potentials.load import load
    from nnqmd_server.training import data
    from nnqmd_server.training.accuracy import errors_on

    folder = FOLDER.parent / "data"
    files = [data.read_frames(folder / f"ammonia_{name}.xyz") for name in ("train", "beads", "cold", "later")]
    data.check([frame for frames in files for frame in frames], ["N", "H"], ["N"], optional=True)
    later = files[-1]
    errors = errors_on(load(str(MODEL), compiled=False), later, data.groups_of(later, "config_type"))
    assert errors["forces_meV_per_A"]["mae"] == pytest.approx(23.7, abs=0.1)
    assert errors["wannier_centroid_A"]["mae"] == pytest.approx(0.0009, abs=1e-4)
