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
from nnqmd_server.training.config import read_config
from nnqmd_server.training.expansion import expand
from nnqmd_server.training.plausibility import check_sizes
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


def sensible(seed=0):
    """A labelled frame whose numbers could be true."""
    frame = labelled(seed)
    frame.calc.results["stress"] = np.zeros(6)
    return frame


def in_bohr(atoms):
    atoms.set_cell(atoms.cell.array / 0.529177, scale_atoms=True)


def in_nanometres(atoms):
    atoms.set_cell(atoms.cell.array / 10, scale_atoms=True)


def atoms_on_each_other(atoms):
    atoms.positions[1] = atoms.positions[0] + 0.2


def large_force(atoms):
    atoms.calc.results["forces"][3, 1] = -150.0


def stress_in_gpa(atoms):
    atoms.calc.results["stress"] = np.full(6, 4.0)


def centroid_is_a_position(atoms):
    atoms.arrays["wannier_centroid"][::4] += atoms.positions[::4] + 3.0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (atoms_on_each_other, "closer than 0.4"),
        (large_force, "force above 100"),
        (stress_in_gpa, "stress that no solid has"),
        (centroid_is_a_position, "centroid more than"),
    ],
)
def test_impossible_labels_are_named(spoil, words):
    frames = [sensible(k) for k in range(6)]
    check_sizes(frames, range(6), ["N"])
    spoil(frames[2])
    spoil(frames[5])
    with pytest.raises(DataError, match=r"Frames 12, 15 ") as caught:
        check_sizes(frames, range(10, 16), ["N"])
    assert words in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(("spoil", "words"), [(in_bohr, "look like bohr"), (in_nanometres, "nanometres")])
def test_positions_in_another_unit_are_recognised(spoil, words):
    frames = [sensible(k) for k in range(3)]
    for frame in frames:
        spoil(frame)
    with pytest.raises(DataError) as caught:
        check_sizes(frames, range(3))
    assert words in caught.value.fix


def following_frames(energy_unit=1.0, force_unit=1.0):
    """A run in small steps with the energy and forces of springs between N and its H (eV, Angstrom)."""
    base = sensible()
    random = np.random.default_rng(3)
    along = random.normal(scale=0.03, size=base.positions.shape)
    frames = []
    for k in range(8):
        frame = base.copy()
        frame.positions += along * k / 3
        energy, forces = -80.0 * len(frame), np.zeros_like(frame.positions)
        for n in range(0, len(frame), 4):
            for h in range(n + 1, n + 4):
                arm = frame.get_distance(n, h, mic=True, vector=True)
                length = np.linalg.norm(arm)
                energy += 20.0 * (length - 0.9) ** 2
                force = 40.0 * (length - 0.9) * arm / length
                forces[n] += force
                forces[h] -= force
        frame.calc = SinglePointCalculator(
            frame, energy=energy * energy_unit, forces=forces * force_unit, stress=np.zeros(6)
        )
        frames.append(frame)
    return frames


def test_energies_and_forces_that_belong_together_pass():
    check_sizes(following_frames(), range(8))


@pytest.mark.parametrize(
    ("energy_unit", "force_unit", "words"),
    [
        (1 / 27.2114, 1.0, "energies in hartree"),
        (23.0605, 1.0, "kcal/mol"),
        (96.4853, 1.0, "kJ/mol"),
        (1.0, 1 / 51.42207, "forces in hartree/bohr"),
        (1.0, -1.0, "gradients"),
    ],
)
def test_energies_and_forces_in_other_units_are_recognised(energy_unit, force_unit, words):
    with pytest.raises(DataError, match="first are frames 9 and 10") as caught:
        check_sizes(following_frames(energy_unit, force_unit), range(5, 13))
    assert words in caught.value.fix


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


def test_short_runs_are_split_together_and_long_ones_as_ever():
    groups = ["long"] * 10 + [name for name in "abcdefg" for _ in range(4)]
    parts = data.split(groups, 0.1, 0.16, join_below=5)
    alone = data.split(groups[:10], 0.1, 0.16)
    assert sorted([*parts.train, *parts.validation, *parts.test]) == list(range(38))
    assert [k for k in parts.test if k < 10] == list(alone.test)
    assert [k for k in parts.validation if k < 10] == list(alone.validation)
    of_short = [groups[k] for k in parts.test if k >= 10]
    assert len(of_short) == 4  # 16 % of 28
    assert len(set(of_short)) == 4
    assert len({groups[k] for k in parts.validation if k >= 10}) == 3
    assert {groups[k] for k in parts.train} == set(groups)
    with pytest.raises(DataError, match="join_below"):
        data.split(groups, 0.1, 0.7, join_below=0)


def test_several_data_files_are_read_one_after_the_other(tmp_path):
    from nnqmd_server.training.train import prepare

    frames = data.read_frames(read_config(SHIPPED).data[0])
    for name, part in (("one.xyz", frames[:12]), ("two.xyz", frames[12:18])):
        for k, frame in enumerate(part):
            frame.info["config_type"] = name if name == "one.xyz" else f"short {k % 3}"
        write(tmp_path / name, part, format="extxyz")
    table = {**TINY, "name": "tiny", "data": ["one.xyz", "two.xyz"], "split": {"join_below": 7}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(table))
    plan = prepare(tmp_path / "tiny.yaml", tmp_path / "run")
    split = json.loads((plan.directory / "split.json").read_text())
    assert [file["file"] for file in split["data"]] == ["one.xyz", "two.xyz"]
    assert sorted(split["train"] + split["validation"] + split["test"]) == list(range(18))
    assert split["test"] == [10, 11, 15]  # the end of the long run, and the middle of the others
    tested = data.read_frames(plan.directory / "test.xyz")
    np.testing.assert_allclose(tested[-1].positions, frames[15].positions, atol=1e-7)
    (plan.directory / "last.ckpt").touch()
    prepare(tmp_path / "tiny.yaml", tmp_path / "run", resume=True)
    with (tmp_path / "two.xyz").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"two\.xyz"):
        prepare(tmp_path / "tiny.yaml", tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="twice"):
        read_config(write_config(tmp_path / "c.yaml", data=["one.xyz", "one.xyz"]))


def test_frames_without_centroids_train_the_rest_alone():
    from nnqmd_server.training.loss import PartialMeanSquaredError

    frames = [labelled(k) for k in range(3)]
    bare = labelled(9)
    del bare.arrays["wannier_centroid"]
    with pytest.raises(DataError, match=r"wannier\.optional"):
        data.check([*frames, bare], ["N", "H"], ["N"])
    data.check([*frames, bare], ["N", "H"], ["N"], optional=True)
    with pytest.raises(DataError, match="no wannier_centroid"):
        data.check([bare], ["N", "H"], ["N"], optional=True)
    assert check_sizes([bare], [0], ["N"]) is None
    prepared = data.prepare(bare, ["N"])
    assert np.isnan(prepared.arrays["wannier_centroid"]).all()
    term = PartialMeanSquaredError()
    weight = torch.ones(4, requires_grad=True)
    value = term(weight[:0], torch.zeros(0))  # a batch of such frames alone
    value.backward()
    assert value == 0
    assert (weight.grad == 0).all()  # and not None: processes add up their gradients
    term.reset()
    assert term(torch.tensor([2.0, 4.0]), torch.zeros(2)) == 10
    assert term.compute() == 10


def test_prepared_frames_carry_only_what_is_trained():
    frame = labelled()
    frame.info["dipole"] = np.ones(3)
    bare = data.prepare(frame, ["N"])
    assert "dipole" not in bare.info
    assert np.isnan(bare.arrays["wannier_centroid"][1:4]).all()
    np.testing.assert_array_equal(bare.arrays["wannier_centroid"][::4], frame.arrays["wannier_centroid"][::4])
    np.testing.assert_array_equal(bare.get_forces(), frame.get_forces())


@pytest.mark.parametrize("name", ["small", "base"])
def test_shipped_data_split_as_the_card_says(name):
    config = read_config(SHIPPED.with_name(f"{name}.yaml"))
    frames = [frame for file in config.data for frame in data.read_frames(file)]
    data.check(frames, config.elements, config.carriers, config.wannier.optional)
    check_sizes(frames, range(len(frames)), config.carriers)
    groups = data.groups_of(frames, config.split.group)
    parts = data.split(groups, config.split.validation, config.split.test, config.split.join_below)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (140, 18, 31)
    card = json.loads((SHIPPED.parent / f"models/{name}/card.json").read_text())
    for key in ("train", "validation", "test"):
        assert list(getattr(parts, key)) == card["data"]["frames"][key]


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
        ({"training": {"schedule": "cosinus"}}, "schedule"),
        ({"training": {"sam_every": 0}}, "sam_every"),
        ({"training": {"adaptive": 1}}, "adaptive cannot be 1"),
        ({"training": {"gradient_clip": 0}}, "gradient_clip"),
        ({"training": {"patience": 0}}, "patience"),
        ({"training": {"batch_size": 3}, "processes": 2}, "shared by 2 processes"),
        ({"training": {"batch_size": 2, "compile": True}, "processes": 2}, "two frames or more"),
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


@pytest.mark.parametrize("name", ["small", "base"])
def test_the_shipped_card_tells_the_truth(name):
    from nnqmd_server.potentials.allegro import load
    from nnqmd_server.training.accuracy import errors_on

    package = SHIPPED.parent / f"models/{name}/ammonia-{name}.nequip.zip"
    card = json.loads((package.parent / "card.json").read_text())
    config = read_config(SHIPPED.with_name(f"{name}.yaml"))
    potential = load(package, compiled=False)
    assert potential.card.sha256 == card["model"]["sha256"]
    frames = [frame for file in config.data for frame in data.read_frames(file)]
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


class Stop(lightning.Callback):
    """Ends a training in the middle of an epoch, as a kill would."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            raise KilledError


class KilledError(Exception):
    pass


def run_nequip(directory, monkeypatch, stop=None, resume=False):
    """nequip's own training script, in this process."""
    from hydra.core.hydra_config import HydraConfig
    from nequip.scripts.train import main
    from omegaconf import OmegaConf

    OmegaConf.clear_resolver("training_data_stats")
    HydraConfig.instance().cfg = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(directory)}}})
    config = OmegaConf.load(directory / "config.yaml")
    if stop is not None:
        config.trainer.callbacks.append({"_target_": "test_training.Stop", "epoch": stop})
    if resume:
        config.ckpt_path = "last.ckpt"
    monkeypatch.chdir(directory)
    main.__wrapped__(config)


def state_of(directory):
    """Weights, moving average, optimiser, learning rates of a training that has ended."""
    saved = torch.load(directory / "last.ckpt", weights_only=False)
    optimizer = saved["optimizer_states"][0]["state"]
    found = {f"adam {k} {name}": v for k, entry in optimizer.items() for name, v in entry.items()}
    found |= {k: v for k, v in saved["state_dict"].items() if isinstance(v, torch.Tensor)}
    return found, [saved["epoch"], saved["global_step"], saved["lr_schedulers"]]


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch, schedule):
    """But for round-off: where arrays lie in memory decides in which order some sums are made."""
    from nnqmd_server.training import train

    write(tmp_path / "frames.xyz", [sensible(k) for k in range(10)], format="extxyz")
    more = {"epochs": 5, "batch_size": 2, "rho": 0.01, "schedule": schedule, "sam_every": 2, "patience": 50}
    config = write_config(tmp_path / "tiny.yaml", **(TINY | {"training": more}))
    whole, parts = (train.prepare(config, tmp_path / name).directory for name in ("whole", "parts"))
    run_nequip(whole, monkeypatch)
    with pytest.raises(KilledError):
        run_nequip(parts, monkeypatch, stop=2)
    assert [e.epoch for e in read_epochs(parts / "epochs.csv")] == [0, 1]
    run_nequip(parts, monkeypatch, resume=True)
    columns = ("epoch", "learning_rate", "train_loss", "energy_rmse", "forces_rmse", "score")
    one, other = (
        [[getattr(e, c) for c in columns] for e in read_epochs(folder / "epochs.csv")]
        for folder in (whole, parts)
    )
    assert len(one) == 5
    np.testing.assert_allclose(other, one, rtol=1e-12, atol=0)
    expected, counts = state_of(whole)
    found, same_counts = state_of(parts)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert counts[:2] == same_counts[:2]
    for name in ("last_epoch", "num_bad_epochs"):  # cosine has no bad epochs
        assert counts[2][0].get(name) == same_counts[2][0].get(name), name


def test_a_training_ends_when_nobody_follows_it(tmp_path, monkeypatch):
    from nnqmd_server.training import train

    write(tmp_path / "frames.xyz", [sensible(k) for k in range(8)], format="extxyz")
    run = train.prepare(write_config(tmp_path / "a.yaml", **TINY), tmp_path / "a").directory
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setenv("NNQMD_TRAIN_OWNER", str(gone.pid))
    with pytest.raises(RuntimeError, match=rf"process {gone.pid}.*is gone"):
        run_nequip(run, monkeypatch)
    assert read_epochs(run / "epochs.csv") == []
    monkeypatch.setenv("NNQMD_TRAIN_OWNER", str(os.getpid()))
    run_nequip(run, monkeypatch)
    assert len(read_epochs(run / "epochs.csv")) == 1


def test_a_learning_rate_falls_along_the_schedule(tmp_path, monkeypatch):
    from nnqmd_server.training import train

    write(tmp_path / "frames.xyz", [sensible(k) for k in range(8)], format="extxyz")
    more = {"epochs": 4, "batch_size": 4, "learning_rate": 0.01}
    run = train.prepare(write_config(tmp_path / "t.yaml", **(TINY | {"training": more})), tmp_path / "run")
    run_nequip(run.directory, monkeypatch)
    rates = [e.learning_rate for e in read_epochs(run.directory / "epochs.csv")]
    cosine = [1e-4 + (0.01 - 1e-4) * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx(cosine, rel=1e-9)


def test_training_stops_early_where_nothing_gets_better(tmp_path, monkeypatch):
    from nnqmd_server.training import train

    write(tmp_path / "frames.xyz", [sensible(k) for k in range(8)], format="extxyz")
    # so slow that the averaged weights do not change
    more = {"epochs": 30, "batch_size": 4, "learning_rate": 1e-300, "patience": 2}
    run = train.prepare(write_config(tmp_path / "t.yaml", **(TINY | {"training": more})), tmp_path / "run")
    run_nequip(run.directory, monkeypatch)
    assert len(read_epochs(run.directory / "epochs.csv")) == 3


def test_a_read_out_on_a_frozen_backbone_leaves_energy_and_forces_alone(tmp_path, monkeypatch):
    """The backbone is a model that was trained on other frames, and without a read-out."""
    from nequip.model.saved_models.load_utils import load_saved_model

    from nnqmd_server.training import train

    write(tmp_path / "frames.xyz", [sensible(k) for k in range(8)], format="extxyz")
    first = {k: v for k, v in TINY.items() if k != "wannier"}
    run = train.prepare(write_config(tmp_path / "a.yaml", **first), tmp_path / "a").directory
    run_nequip(run, monkeypatch)

    write(tmp_path / "frames.xyz", [sensible(20 + k) for k in range(8)], format="extxyz")
    wannier = TINY["wannier"] | {"backbone": "a/best.ckpt"}
    more = {"epochs": 8, "batch_size": 2, "learning_rate": 0.01}
    second = TINY | {"wannier": wannier, "training": more}
    config = write_config(tmp_path / "b.yaml", **second)
    plan = train.prepare(config, tmp_path / "b")
    run_nequip(plan.directory, monkeypatch)
    losses = [e.train_loss for e in read_epochs(plan.directory / "epochs.csv")]
    assert losses[-1] < losses[0]
    backbone, both = load_saved_model(run / "best.ckpt"), load_saved_model(plan.directory / "best.ckpt")
    frame = ChemicalSpeciesToAtomTypeMapper(["N", "H"])(from_ase(ammonia(5)))
    graph = compute_neighborlist_(frame, TINY["network"]["cutoff"])
    one, other = backbone(graph.copy()), both(graph.copy())
    for key in ("total_energy", "forces", "stress"):
        assert torch.equal(one[key], other[key]), key
    assert float(other["wannier_centroid"].detach().abs().max()) > 0

    wrong = TINY | {"wannier": wannier, "network": TINY["network"] | {"cutoff": 3.0}}
    with pytest.raises(InputError, match=r"best\.ckpt has r_max 3\.5"):
        train.prepare(write_config(tmp_path / "c.yaml", **wrong), tmp_path / "c")


def test_a_training_begins_with_the_weights_of_another(tmp_path, monkeypatch):
    from nequip.model.saved_models.load_utils import load_saved_model

    from nnqmd_server.training import train

    write(tmp_path / "frames.xyz", [sensible(k) for k in range(8)], format="extxyz")
    run = train.prepare(write_config(tmp_path / "a.yaml", **TINY), tmp_path / "a").directory
    run_nequip(run, monkeypatch)
    write(tmp_path / "frames.xyz", [sensible(20 + k) for k in range(8)], format="extxyz")
    still = TINY | {"training": {"epochs": 1, "learning_rate": 1e-300}}  # what it began with comes out again
    config = write_config(tmp_path / "b.yaml", **still)
    plan = train.prepare(config, tmp_path / "b", start=run / "best.ckpt")
    run_nequip(plan.directory, monkeypatch)
    old, new = (load_saved_model(folder / "best.ckpt") for folder in (run, plan.directory))
    weights = dict(new.named_parameters())
    assert any("wannier" in name for name in weights)
    for name, weight in old.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=1e-14, atol=1e-14, msg=name)
    frame = ChemicalSpeciesToAtomTypeMapper(["N", "H"])(from_ase(ammonia(5)))
    graph = compute_neighborlist_(frame, TINY["network"]["cutoff"])
    one, other = old(graph.copy()), new(graph.copy())
    for key in ("total_energy", "forces", "wannier_centroid"):  # statistics of the first data, too
        torch.testing.assert_close(one[key], other[key], rtol=1e-12, atol=1e-12, msg=key)

    both = TINY | {"start": "a/best.ckpt", "wannier": TINY["wannier"] | {"backbone": "a/best.ckpt"}}
    with pytest.raises(InputError, match="neither `start`"):
        read_config(write_config(tmp_path / "c.yaml", **both))


def test_matrix_products_give_what_allegros_own_products_give(graphs):
    from nnqmd_server.training import contraction

    module = training_module()
    batch = AtomicDataDict.batched_from_list(graphs[:2])
    before = gradient(module, batch)
    energy = module(batch.copy())["total_energy"].detach()
    assert contraction.on(module.model) > 0
    after = gradient(module, batch)
    scale = max(float(g.abs().max()) for g in before)
    assert largest_difference(before, after) < 1e-12 * scale
    torch.testing.assert_close(module(batch.copy())["total_energy"].detach(), energy, rtol=1e-14, atol=0)
    assert contraction.on(module.model) == 0
    assert contraction.off(module.model) > 0


def test_frames_are_prepared_once(tmp_path, monkeypatch):
    from nnqmd_server.training import kept_frames

    write(tmp_path / "f.xyz", [data.prepare(labelled(k)) for k in range(4)], format="extxyz")
    calls = []

    def transform(frame):
        calls.append(1)
        return frame | {"mark": torch.ones(3)}

    frames = kept_frames.KeptFrames(str(tmp_path / "f.xyz"), transforms=[transform])
    first = frames[[0, 1, 0, 3]]
    again = frames[0:4]
    assert len(calls) == 4
    assert first[1]["mark"] is again[1]["mark"]
    first[0]["pos"] = None  # a batch may change its dictionary
    assert frames[0]["pos"] is not None
    monkeypatch.setattr(kept_frames, "MOST_BYTES", 10)
    small = kept_frames.KeptFrames(str(tmp_path / "f.xyz"), transforms=[transform])
    assert len(small[[0, 0]]) == 2
    assert len(calls) == 6  # no room: prepared each time


def test_plain_training_from_the_same_file():
    from nnqmd_server.training.config import plain

    config = read_config(SHIPPED)
    assert config.training.rho > 0
    one, other = expand(config, 3), expand(plain(config), 3)
    assert other["training_module"].pop("rho") == 0.0
    assert one["training_module"].pop("rho") == config.training.rho
    assert one == other
    assert plain(config).name == f"{config.name}-plain"


def test_rho_of_the_command_line_is_the_one_trained(tmp_path):
    from nnqmd_server.training import train

    write(tmp_path / "frames.xyz", [sensible(k) for k in range(8)], format="extxyz")
    config = write_config(tmp_path / "a.yaml", **TINY)
    plan = train.prepare(config, tmp_path / "a", rho=0.02)
    written = yaml.safe_load((plan.directory / "config.yaml").read_text())
    assert written["training_module"]["rho"] == plan.config.training.rho == 0.02
    with pytest.raises(InputError, match=r"cannot be -0\.1"):
        train.prepare(config, tmp_path / "b", rho=-0.1)
    with pytest.raises(InputError, match="--plain is rho = 0"):
        train.prepare(config, tmp_path / "b", without_sam=True, rho=0.02)


def test_a_compiled_training_needs_a_compiler(tmp_path, monkeypatch):
    from nnqmd_server.training import train

    write(tmp_path / "frames.xyz", [sensible(k) for k in range(8)], format="extxyz")
    config = write_config(tmp_path / "a.yaml", **TINY | {"training": {"epochs": 1, "compile": True}})
    plan = train.prepare(config, tmp_path / "a")
    written = yaml.safe_load((plan.directory / "config.yaml").read_text())
    assert written["training_module"]["model"]["compile_mode"] == "compile"
    monkeypatch.setattr(train, "find_compiler", lambda: None)
    with pytest.raises(InputError, match=r"no C\+\+ compiler") as caught:
        train.prepare(config, tmp_path / "b")
    assert "compile: false" in caught.value.fix


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
        "import sys; sys.modules['nnqmd_server.training'] = None; "  # any import of it fails
        "from ase.io import read; from nnqmd_server.potentials.allegro import load; "
        "from nnqmd_server.structures import from_ase; "
        f"p = load({str(package)!r}, compiled=False); "
        f"r = p.evaluate(from_ase([read({str(run / 'test.xyz')!r})])); "
        "assert r.atom_properties['wannier_centroid'].shape == (12, 3); "
        "assert not [m for m in sys.modules if m.startswith('nnqmd_server.training.')]"
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
