"""Training: sharpness-aware steps equal the textbook's, data are checked, splits honest, the whole runs."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import yaml
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper
from nequip.utils.global_state import set_global_state
from test_networks import ALLEGRO, CUTOFF, WANNIER, ammonia

from nnqmd_server.errors import DataError, InputError, OutputError, ProgramError
from nnqmd_server.training import data
from nnqmd_server.training.config import expand, read_config
from nnqmd_server.training.progress import COLUMNS, read_epochs

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples/ammonia/small.yaml"
RHO, LEARNING_RATE, CLIP = 0.05, 0.02, 0.5


def labelled(seed=0, run="a", molecules=3):
    """A frame with made-up but finite labels."""
    random = np.random.default_rng(seed)
    atoms = ammonia(seed, molecules)
    stress = random.normal(scale=0.01, size=6)
    forces = random.normal(size=(len(atoms), 3))
    energy = -80.0 * len(atoms) + random.normal()
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)
    centroids = np.zeros((len(atoms), 3))
    centroids[::4] = random.normal(scale=0.2, size=(len(atoms) // 4, 3))
    atoms.set_array("wannier_centroid", centroids)
    atoms.info["config_type"] = run
    return atoms


# --- sharpness-aware minimisation ---


def metric(field, coeff, **more):
    return {"name": str(field), "field": field, "coeff": coeff, **more,
            "metric": {"_target_": "nequip.train.MeanSquaredError"}}  # fmt: skip


LOSS = {
    "_target_": "nequip.train.MetricsManager",
    "metrics": [
        metric("total_energy", 1.0),
        metric("forces", 5.0),
        metric("wannier_centroid", 20.0, ignore_nan=True),
    ],
}


def training_module(kind="EMASAMLightningModule", **more):
    from nnqmd_server.training import sam

    set_global_state()
    model = {"_target_": "nnqmd_server.networks.allegro_wannier.AllegroWannier", **ALLEGRO, **WANNIER}
    modules = vars(sam) | {"EMALightningModule": sam.EMALightningModule}
    return modules[kind](
        model=model,
        loss=LOSS,
        val_metrics=None,
        optimizer={"_target_": "torch.optim.SGD", "lr": LEARNING_RATE},
        num_datasets={"train": 1, "val": 0, "test": 0, "predict": 0},
        **more,
    )


@pytest.fixture(scope="module")
def graphs():
    """Eight frames; every other one has four molecules instead of three."""
    frames = [data.prepare(labelled(k, molecules=3 + k % 2), ["N"]) for k in range(8)]
    return [
        compute_neighborlist_(
            ChemicalSpeciesToAtomTypeMapper(["N", "H"])(
                AtomicDataDict.with_batch_(from_ase(frame, include_keys=["wannier_centroid"]))
            ),
            CUTOFF,
        )
        for frame in frames
    ]


@pytest.fixture(scope="module")
def batches(graphs):
    return [AtomicDataDict.batched_from_list(graphs[k : k + 2]) for k in range(0, 8, 2)]


def run_trainer(module, batches, tmp_path, **more):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **({"max_epochs": 1} | more),
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return [p.detach().clone() for p in module.model.parameters()], list(module.ema.ema_weights)


def gradient(module, batch):
    module.zero_grad()
    value = module.loss(module(batch.copy()), batch)["weighted_sum"]
    value.backward()
    module.loss.reset()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.model.parameters()]


def textbook(module, batches, rho, clip, adaptive=False, sharp=lambda step: True):
    """SAM with SGD, gradient clipping and a moving average, written out; ``sharp``: which steps, from 1."""
    weights = list(module.model.parameters())
    average = [w.detach().clone() for w in weights]
    for step, batch in enumerate(batches, start=1):
        with torch.no_grad():
            g = gradient_with_grad(module, batch)
            here = [w.clone() for w in weights]
            if sharp(step):
                wide = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
                length = torch.sqrt(sum(((t * x) ** 2).sum() for t, x in zip(wide, g, strict=True)))
                for w, x, t in zip(weights, g, wide, strict=True):
                    w += rho * t * t * x / length
                g = gradient_with_grad(module, batch)
            length = torch.sqrt(sum((x**2).sum() for x in g))
            factor = min(1.0, clip / (length + 1e-6))  # torch's clip_grad_norm_
            decay = min(0.9, (1 + step) / (10 + step))  # nequip's warm-up of the average
            for w, x, w0, a in zip(weights, g, here, average, strict=True):
                w.copy_(w0 - LEARNING_RATE * factor * x)
                a += (1 - decay) * (w - a)
    return [w.detach().clone() for w in weights], average


def gradient_with_grad(module, batch):
    with torch.enable_grad():
        return gradient(module, batch)


def largest_difference(ones, others):
    return max(float((a - b).abs().max()) for a, b in zip(ones, others, strict=True))


def test_sam_equals_the_textbook_step(batches, tmp_path):
    expected, expected_average = textbook(training_module(rho=RHO), batches, RHO, CLIP)
    module = training_module(rho=RHO, ema_decay=0.9)
    weights, average = run_trainer(module, batches, tmp_path, gradient_clip_val=CLIP)
    assert largest_difference(weights, expected) < 1e-12
    assert largest_difference(average, expected_average) < 1e-12
    plain, _ = run_trainer(training_module(rho=0.0), batches, tmp_path, gradient_clip_val=CLIP)
    assert largest_difference(weights, plain) > 1e-6  # the comparison above can fail


def test_sam_on_two_processes_equals_the_textbook_step(graphs, batches, tmp_path):
    """Each process has one frame of every batch; the frames differ in size."""
    expected, expected_average = textbook(training_module(rho=RHO), batches, RHO, CLIP)
    torch.save(graphs, tmp_path / "graphs.pt")
    command = [sys.executable, str(ROOT / "tests/ddp_training.py"), "graphs.pt", "out.pt"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=tmp_path, env=settings, check=False, timeout=250, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "out.pt")
    first, _ = textbook(training_module(), batches[:1], RHO, CLIP)
    assert largest_difference(found["first"], first) < 1e-12
    # Sums in another order differ in the last bit, and three more steps amplify that.
    assert largest_difference(found["weights"], expected) < 1e-9
    assert largest_difference(found["average"], expected_average) < 1e-9


def test_adaptive_sam_equals_the_textbook_step(batches, tmp_path):
    expected, _ = textbook(training_module(), batches, 0.5, CLIP, adaptive=True)
    weights, _ = run_trainer(
        training_module(rho=0.5, adaptive=True), batches, tmp_path, gradient_clip_val=CLIP
    )
    assert largest_difference(weights, expected) < 1e-12
    other, _ = textbook(training_module(), batches, 0.5, CLIP)
    assert largest_difference(weights, other) > 1e-6


@pytest.mark.parametrize(
    ("settings", "sharp"),
    [
        ({"sam_every": 3}, lambda step: step in (1, 4, 7)),
        ({"sam_start_epoch": 1}, lambda step: step > 4),
        ({"sam_start_epoch": 1, "sam_every": 2}, lambda step: step in (5, 7)),
    ],
)
def test_some_steps_only_are_sharpness_aware(batches, tmp_path, settings, sharp):
    """Two epochs of four batches."""
    expected, _ = textbook(training_module(), batches * 2, RHO, CLIP, sharp=sharp)
    module = training_module(rho=RHO, **settings)
    weights, _ = run_trainer(module, batches, tmp_path, gradient_clip_val=CLIP, max_epochs=2)
    assert largest_difference(weights, expected) < 1e-12


def test_rho_zero_is_plain_training_to_the_last_bit(batches, tmp_path):
    ours = run_trainer(training_module(rho=0.0, ema_decay=0.9), batches, tmp_path)
    nequips = run_trainer(training_module("EMALightningModule", ema_decay=0.9), batches, tmp_path)
    assert largest_difference(ours[0], nequips[0]) == 0.0
    assert largest_difference(ours[1], nequips[1]) == 0.0


def test_the_logged_loss_is_that_of_the_unperturbed_weights(batches, tmp_path):
    module = training_module(rho=1.0)
    expected = module.loss(module(batches[0].copy()), batches[0])["weighted_sum"].item()
    module.loss.reset()
    seen = []

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(pl_module.loss.compute()["weighted_sum"].item())

    run_trainer(module, batches[:1], tmp_path, callbacks=[Watch()])
    assert seen == [pytest.approx(expected, rel=1e-12)]


def test_no_step_into_a_direction_that_is_not_finite():
    from nnqmd_server.training.sam import perturb

    layer = torch.nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[float("nan"), 1.0]])
    before = layer.weight.detach().clone()
    perturb(layer, 0.1)
    assert torch.equal(layer.weight, before)


def test_accumulated_gradients_are_refused(batches, tmp_path):
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        run_trainer(training_module(rho=0.01), batches, tmp_path, accumulate_grad_batches=2)


# --- data ---


def test_good_frames_pass():
    data.check([labelled(k) for k in range(3)], ["N", "H"], ["N"])


def break_forces(atoms):
    atoms.calc.results["forces"][1, 2] = np.nan


def break_centroid(atoms):
    atoms.arrays["wannier_centroid"][0, 0] = np.inf


def break_element(atoms):
    atoms.symbols[2] = "O"


def break_cell(atoms):
    atoms.pbc = [True, True, False]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_forces, "NaN or infinite"),
        (break_centroid, "NaN or infinite"),
        (break_element, "elements other than N, H"),
        (break_cell, "no periodic cell"),
        (lambda atoms: atoms.calc.results.pop("energy"), "no energy"),
        (lambda atoms: atoms.calc.results.pop("stress"), "no stress"),
        (lambda atoms: atoms.arrays.pop("wannier_centroid"), "no wannier_centroid"),
    ],
)
def test_bad_frames_are_named(spoil, words):
    frames = [labelled(k) for k in range(5)]
    spoil(frames[1])
    spoil(frames[3])
    with pytest.raises(DataError, match="Frames 1, 3 ") as caught:
        data.check(frames, ["N", "H"], ["N"])
    assert words in caught.value.what
    assert caught.value.fix


def test_nan_on_atoms_without_centroid_is_fine():
    frame = labelled()
    frame.arrays["wannier_centroid"][1:4] = np.nan
    data.check([frame], ["N", "H"], ["N"])


def test_repeated_frames_are_named():
    with pytest.raises(DataError, match=r"Frame 2 .* same structure"):
        data.check([labelled(0), labelled(1), labelled(0)], ["N", "H"], ["N"])


def test_force_limit_and_outliers():
    frames = [labelled(k) for k in range(12)]
    frames[4].calc.results["forces"][0] = [0, 0, 90.0]
    assert data.filter_forces(frames, 50.0) == ([k for k in range(12) if k != 4], [4])
    assert data.outliers(frames) == {4: pytest.approx(90.0)}
    with pytest.raises(DataError, match="No frame"):
        data.filter_forces(frames, 1e-6)


def test_split_is_chronological_in_every_run_and_does_not_overlap():
    groups = ["a"] * 12 + ["b"] * 14 + ["a"] * 3 + ["c"] * 10
    parts = data.split(groups, validation=0.1, test=0.16)
    everything = parts.train + parts.validation + parts.test
    assert sorted(everything) == list(range(len(groups)))
    for run in "abc":
        train, validation, test = (
            [k for k in part if groups[k] == run] for part in (parts.train, parts.validation, parts.test)
        )
        assert max(train) < min(validation)
        assert max(validation) < min(test)


def test_a_run_too_short_to_split_is_named():
    with pytest.raises(DataError, match="'b' has 2 frames"):
        data.split(["a"] * 9 + ["b"] * 2, 0.1, 0.16)


def test_prepared_frames_carry_only_what_is_trained():
    frame = labelled()
    frame.info["dipole"] = np.ones(3)
    bare = data.prepare(frame, ["N"])
    assert "dipole" not in bare.info
    assert np.isnan(bare.arrays["wannier_centroid"][1:4]).all()
    np.testing.assert_array_equal(bare.arrays["wannier_centroid"][::4], frame.arrays["wannier_centroid"][::4])
    np.testing.assert_array_equal(bare.get_forces(), frame.get_forces())


def test_shipped_data_split_as_the_card_says():
    config = read_config(SHIPPED)
    frames = data.read_frames(config.data)
    data.check(frames, config.elements, config.carriers)
    parts = data.split(data.groups_of(frames, config.split.group), config.split.validation, config.split.test)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (47, 5, 10)


# --- configuration ---


def write_config(path, **changes):
    table = {"name": "tiny", "data": "frames.xyz", "elements": ["N", "H"]} | changes
    path.write_text(yaml.safe_dump(table))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"networks": {}}, "unknown key `networks`"),
        ({"network": {"cutof": 4}}, "unknown key `cutof`"),
        ({"training": {"epochs": "many"}}, "epochs cannot be 'many'"),
        ({"training": {"epochs": 2.5}}, "epochs cannot be 2.5"),
        ({"training": {"rho": -1}}, "rho"),
        ({"elements": [False, "H"]}, "elements"),
        ({"split": {"test": 0.9, "validation": 0.2}}, "fractions"),
        ({"loss": {"forces": 0}}, "positive"),
        ({"wannier": {"carriers": {"N": 8}, "ion_charges": {"N": 5}}}, "ion_charges"),
        ({"wannier": {"carriers": {"O": 8}, "ion_charges": {"N": 5, "H": 1}}}, "carriers"),
    ],
)
def test_wrong_configurations_are_named(tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        read_config(write_config(tmp_path / "c.yaml", **changes))
    assert caught.value.fix


def test_a_misspelt_key_brings_the_right_one(tmp_path):
    with pytest.raises(InputError) as caught:
        read_config(write_config(tmp_path / "c.yaml", network={"cutof": 4}))
    assert "`cutoff`" in caught.value.fix


def test_errors_in_the_configuration_are_weights_of_equal_cost():
    full = expand(read_config(SHIPPED), epochs=3)
    coeffs = {m["name"]: m["coeff"] for m in full["training_module"]["loss"]["metrics"]}
    aims = read_config(SHIPPED).loss
    cost = [
        coeffs["energy_mse"] * (aims.energy * 1e-3) ** 2,
        coeffs["forces_mse"] * (aims.forces * 1e-3) ** 2,
    ]
    cost += [coeffs["stress_mse"] * (aims.stress * 0.00624151) ** 2]  # 1 GPa in eV/A^3
    cost += [coeffs["wannier_centroid_mse"] * aims.wannier_centroid**2]
    np.testing.assert_allclose(cost, 1.0, rtol=1e-5)


def test_epoch_log_leaves_out_a_line_being_written(tmp_path):
    path = tmp_path / "epochs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, [0, 1.0, *[0.5] * 7], [1, 2.0, 0.5]])
    assert [epoch.epoch for epoch in read_epochs(path)] == [0]


# --- errors and the card ---


class Wrong:
    """A potential that is wrong by known amounts."""

    def __init__(self):
        from nnqmd_server.potentials.base import Card

        self.card = Card(
            "w", "0", ("N", "H"), 4.0, "float64", ("wannier_centroid",), {"N": 5, "H": 1}, {"N": 8}
        )

    def answer(self, frames):
        from nnqmd_server.structures import Results, from_ase

        structures = from_ase(frames)
        stress = np.array([frame.get_stress(voigt=False) for frame in frames]) + 0.5 * 0.00624151  # 0.5 GPa
        self.results = Results(
            energy=np.array([frame.get_potential_energy() + 2e-3 * len(frame) for frame in frames]),
            forces=np.concatenate([f.get_forces() + 0.03 * (f.numbers == 1)[:, None] for f in frames]),
            virial=-stress * structures.volumes[:, None, None],
            atom_properties={
                "wannier_centroid": np.concatenate([f.arrays["wannier_centroid"] for f in frames])
                + np.array([0.01, 0, 0])
            },
        )
        return self

    def evaluate(self, structures):
        return self.results


def test_errors_come_in_the_units_they_are_named_with():
    from nnqmd_server.training.accuracy import errors_on

    frames = [labelled(0), labelled(1, "b", molecules=4)]
    errors = errors_on(Wrong().answer(frames), frames, ["a", "b"])
    for key, expected in {
        "energy_meV_per_atom": 2.0,
        "forces_meV_per_A": 0.75 * 30,
        "stress_GPa": 0.5,
        "wannier_centroid_A": 0.01,
        "molecular_dipole_D": 0.08 * 4.80320,  # 8 electrons; 1 e Angstrom in debye
    }.items():
        assert errors[key]["mae"] == pytest.approx(expected, rel=1e-5), key
    assert errors["forces_by_element_meV_per_A"]["H"]["rmse"] == pytest.approx(30.0)
    assert errors["forces_by_element_meV_per_A"]["N"]["rmse"] == pytest.approx(0.0, abs=1e-9)
    assert errors["by_run"]["b"]["frames"] == 1


def test_the_shipped_card_tells_the_truth():
    from nnqmd_server.potentials.allegro import load
    from nnqmd_server.training.accuracy import errors_on

    package = SHIPPED.parent / "models/small/ammonia-small.nequip.zip"
    card = json.loads((package.parent / "card.json").read_text())
    config = read_config(SHIPPED)
    potential = load(package, compiled=False)
    assert potential.card.sha256 == card["model"]["sha256"]
    frames = data.read_frames(config.data)
    test = [frames[k] for k in card["data"]["frames"]["test"]]
    errors = errors_on(potential, test, data.groups_of(test, config.split.group))
    for key in ("energy_meV_per_atom", "forces_meV_per_A", "stress_GPa", "molecular_dipole_D"):
        assert errors[key]["rmse"] == pytest.approx(card["errors"]["test"][key]["rmse"], rel=1e-3), key


# --- the whole ---

TINY = {
    "elements": ["N", "H"],
    "device": "cpu",
    "wannier": {"carriers": {"N": 8}, "ion_charges": {"N": 5, "H": 1}, "hidden_width": 4},
    "network": {"cutoff": 3.5, "layers": 1, "scalar_features": 4, "tensor_features": 2, "hidden_width": 4,
                "precision": "float64"},
    "training": {"epochs": 1, "batch_size": 4, "rho": 0.005},
}  # fmt: skip


def test_train_command_from_frames_to_a_package(tmp_path):
    from typer.testing import CliRunner

    from nnqmd_server.cli import app

    frames = [labelled(k) for k in range(8)]
    for k, frame in enumerate(frames):
        frame.info["run"] = "early" if k < 4 else "late"
    write(tmp_path / "frames.xyz", frames, format="extxyz")
    config = write_config(tmp_path / "tiny.yaml", **TINY, split={"group": "run"})
    run = tmp_path / "run"
    done = CliRunner().invoke(app, ["train", str(config), "--out", str(run)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "frames never seen" in done.output
    card = json.loads((run / "card.json").read_text())
    assert card["data"]["frames"] == {
        "train": [0, 1, 4, 5],
        "validation": [2, 6],
        "test": [3, 7],
        "left_out": [],
    }
    assert set(card["errors"]["test"]["by_run"]) == {"early", "late"}
    assert set(card["errors"]["test"]) >= {"energy_meV_per_atom", "stress_GPa", "molecular_dipole_D"}
    assert (run / "CARD.md").read_text().startswith("# tiny.nequip.zip")
    assert (run / "learning_curve.png").stat().st_size > 1000
    assert len(read_epochs(run / "epochs.csv")) == 1

    package = run / "tiny.nequip.zip"
    assert str(tmp_path).encode() not in package.read_bytes()
    fresh = (
        "import sys; from ase.io import read; from nnqmd_server.potentials.allegro import load; "
        "from nnqmd_server.structures import from_ase; "
        f"p = load({str(package)!r}, compiled=False); "
        f"r = p.evaluate(from_ase([read({str(run / 'test.xyz')!r})])); "
        "assert r.atom_properties['wannier_centroid'].shape == (12, 3); "
        "assert not [m for m in sys.modules if m.startswith('nnqmd_server.training')]"
    )
    subprocess.run([sys.executable, "-c", fresh], check=True)

    with pytest.raises(OutputError, match="not empty"):
        CliRunner().invoke(app, ["train", str(config), "--out", str(run)], catch_exceptions=False)
    with pytest.raises(InputError, match="differs"):
        CliRunner().invoke(
            app,
            ["train", str(config), "--out", str(run), "--resume", "--epochs", "5"],
            catch_exceptions=False,
        )


def test_a_failing_trainer_shows_the_end_of_its_log(tmp_path):
    from nnqmd_server.training import train

    write(tmp_path / "frames.xyz", [labelled(k) for k in range(8)], format="extxyz")
    plan = train.prepare(write_config(tmp_path / "tiny.yaml", **TINY), tmp_path / "run")
    (tmp_path / "run/train.xyz").unlink()
    with pytest.raises(ProgramError, match="No such file") as caught:
        train.fit(plan)
    assert str(plan.directory / "trainer.log") in caught.value.what
