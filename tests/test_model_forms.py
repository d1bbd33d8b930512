"""Model files of every form: their cards, their forces, and what is said of files that are not models."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from conftest import MODEL, crystal, triclinic
from test_pool import toys  # noqa: F401 - a fixture
from test_training import training_module
from typer.testing import CliRunner

from nnqmd_server.cli import app
from nnqmd_server.errors import InputError, ModelError, StructureError, UnknownElementError
from nnqmd_server.potentials import compiled as compiling
from nnqmd_server.potentials.allegro import Allegro, load
from nnqmd_server.potentials.forms import check_hardware
from nnqmd_server.potentials.load import absolute, card_of, check_hashes, own_name, parse_models, source_hash
from nnqmd_server.potentials.package import CARD_KEY, FORMS, form_of, read_card
from nnqmd_server.structures import from_ase

LEGACY = Path(__file__).parent / "data/legacy"
LEGATO, SIX = LEGACY / "legato-0.5.5.pth", LEGACY / "allegro-0.6.1.pth"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What nequip-train leaves behind, with random weights."""
    import lightning

    module = training_module(info_dict={
        "versions": {},
        "data": {},
        "training_module": {
            "_target_": "nnqmd_server.training.sam.EMASAMLightningModule",
            "model": {"_target_": "nnqmd_server.networks.allegro_wannier.AllegroWannier", **network()},
        },
    })  # fmt: skip
    path = tmp_path_factory.mktemp("checkpoint") / "best.ckpt"
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=0,
    )  # fmt: skip
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def network():
    from test_networks import ALLEGRO, WANNIER

    return {**ALLEGRO, **WANNIER}


@pytest.fixture(scope="module")
def given(potential, tmp_path_factory):
    """The compiled form of the shipped model, as somebody else would hand it on."""
    path, form = compiling.compiled_model(MODEL, potential.card, "cpu")
    assert form.endswith("(cached)")
    copy = tmp_path_factory.mktemp("compiled") / "given.nequip.pt2"
    shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def files(checkpoint, given):
    return {"package": MODEL, "checkpoint": checkpoint, "compiled": given, "torchscript": LEGATO}


def rewritten(source, target, change):
    """A zip file with changed members; ``change(name, data)`` gives the new data, or None for none."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            data = change(item.filename, old.read(item))
            if data is not None:
                new.writestr(item.filename, data)
    return target


# --- cards ---


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_known_by_its_contents(files, form, tmp_path):
    assert form_of(files[form]) == form
    odd = tmp_path / "no-ending"
    shutil.copy(files[form], odd)
    assert form_of(odd) == form
    card = read_card(files[form])
    assert card.sha256 == source_hash(str(files[form]))
    assert set(card.elements) == {"N", "H"}
    assert card.dtype in {"float32", "float64"}


@pytest.mark.parametrize("form", FORMS)
def test_model_info_prints_the_card_and_executes_nothing(files, form):
    code = (
        "import sys; from nnqmd_server.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "sys.exit(3 if 'torch' in sys.modules or 'nequip' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "model", "info", str(files[form])],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    card = read_card(files[form])
    for part in (FORMS[form], card.sha256, " ".join(card.elements), f"{card.cutoff:g} Angstrom", card.dtype):
        assert part in done.stdout


def test_what_only_some_forms_say(files):
    def shown(path):
        return CliRunner().invoke(app, ["model", "info", str(path)], catch_exceptions=False).output

    assert "cpu x86_64" in shown(files["compiled"]) or "cpu aarch64" in shown(files["compiled"])
    assert "nequip 0.5.5" in shown(LEGATO)
    assert "nequip 0.6.1" in shown(SIX)
    assert "N (8 electrons)" in shown(files["checkpoint"])


def test_cards_of_deployed_models():
    legato, six = read_card(LEGATO), read_card(SIX)
    assert (legato.elements, legato.cutoff, legato.dtype) == (("H", "N"), 4.0, "float32")
    assert (six.elements, six.cutoff, six.dtype) == (("H", "N"), 3.5, "float64")
    assert legato.strictly_local
    assert six.strictly_local


def test_a_checkpoint_has_the_card_of_its_package(checkpoint):
    card = read_card(checkpoint)
    assert (card.elements, card.cutoff, card.dtype) == (("N", "H"), network()["r_max"], "float64")
    assert card.carriers == {"N": 8}
    assert card.properties == ("wannier_centroid", "dipole")
    assert card.strictly_local


# --- forces ---


def test_a_checkpoint_gives_the_forces_of_its_network(checkpoint):
    from test_networks import build, evaluate

    potential = load(checkpoint, compiled=False)
    atoms = triclinic()
    results = potential.evaluate(from_ase([atoms]))
    wanted = evaluate(build(), atoms)
    assert results.forces == pytest.approx(wanted["forces"].detach().numpy(), abs=1e-12)
    assert results.properties["dipole"].shape == (1, 3)


def test_a_given_compiled_model_is_the_compiled_model(given, potential):
    mine = load(given)
    assert mine.form == "compiled for cpu, as given"
    structures = from_ase([crystal(), triclinic()])
    one, other = mine.evaluate(structures), potential.evaluate(structures)
    assert np.array_equal(one.forces, other.forces)
    assert np.array_equal(one.atom_properties["wannier_centroid"], other.atom_properties["wannier_centroid"])


def references(path):
    (found,) = json.loads(path.with_name(f"{path.name}.json").read_text()).values()
    for name, entry in found.items():
        atoms = Atoms(entry["numbers"], entry["positions"], cell=entry["cell"], pbc=entry["pbc"])
        yield name, atoms, entry


@pytest.fixture(scope="module", params=[LEGATO, SIX], ids=["0.5.5", "0.6.1"])
def deployed(request):
    return request.param, load(request.param)


def test_a_deployed_model_gives_what_its_own_program_gave(deployed):
    """Energies, forces and stress from the ASE calculator of nequip 0.5.5 and 0.6.1 on torch 1.13."""
    path, potential = deployed
    assert potential.form == "TorchScript on cpu"
    exact = potential.card.dtype == "float64"
    seen = 0
    for name, atoms, entry in references(path):
        results = potential.evaluate(from_ase([atoms]))
        # In "double" the atoms stand up to 30 Angstrom away: their program lost digits of float32 there.
        loose = {"double": 3e-5}.get(name, 5e-6)
        assert results.forces == pytest.approx(np.array(entry["forces"]), abs=1e-12 if exact else loose), name
        assert abs(results.forces).max() > 0.1
        energy = len(atoms) * (1e-12 * 80 if exact else 2e-5)
        assert results.energy[0] == pytest.approx(entry["energy"], abs=energy), name
        if entry["stress"] is not None:
            wanted = -np.array(entry["stress"]) * atoms.get_volume()
            assert results.virial[0] == pytest.approx(wanted, abs=1e-11), name
            seen += 1
    assert seen == (3 if path == SIX else 0)


def test_the_virial_of_ghosts_is_the_derivative_with_strain(deployed):
    """An Allegro-Legato model has no stress output; what its ghosts give must still be one."""
    path, potential = deployed
    (atoms,) = (atoms for name, atoms, _ in references(path) if name == "crystal")
    virial = potential.evaluate(from_ase([atoms])).virial[0]
    step = 2e-3 if potential.card.dtype == "float64" else 2e-2
    for a, b in ((0, 0), (1, 1), (0, 2)):
        energies = []
        for sign in (-2, -1, 1, 2):
            strain = np.eye(3)
            strain[a, b] += sign * step / 2
            strain[b, a] += sign * step / 2
            other = atoms.copy()
            other.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            energies.append(potential.evaluate(from_ase([other])).energy[0])
        slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step)
        tolerance = 1e-6 if potential.card.dtype == "float64" else 5e-3
        assert -slope == pytest.approx(virial[a, b], abs=tolerance * max(1.0, abs(virial).max())), (a, b)
    assert abs(virial).max() > 0.1


def test_a_batch_of_a_deployed_model_is_its_structures(deployed):
    path, potential = deployed
    structures = from_ase(
        [atoms for _, atoms, _ in references(path)] + [Atoms("N"), Atoms("NH", [[0, 0, 0], [9, 0, 0]])]
    )
    together = Allegro(potential._model, potential.card, "cpu", potential.form, most_edges=10**9)
    batch = together.evaluate(structures)
    single = potential.evaluate(structures)
    limit = 1e-12 if potential.card.dtype == "float64" else 3e-6
    assert batch.forces == pytest.approx(single.forces, abs=limit)
    assert batch.energy == pytest.approx(single.energy, rel=limit / 10)
    assert batch.virial == pytest.approx(single.virial, abs=30 * limit)


def test_a_deployed_model_splits_by_centres(deployed):
    path, potential = deployed
    (atoms,) = (atoms for name, atoms, _ in references(path) if name == "double")
    structures = from_ase([atoms])
    whole = potential.evaluate(structures)
    parts = [potential.evaluate_centres(structures, np.arange(k, len(atoms), 3)) for k in range(3)]
    limit = 1e-11 if potential.card.dtype == "float64" else 1e-5
    assert sum(p.forces for p in parts) == pytest.approx(whole.forces, abs=limit)
    assert sum(p.energy for p in parts) == pytest.approx(whole.energy, rel=limit)


def no_allegro(texts):
    return texts.replace(b"allegro.model", b"nequip.model")


def test_a_model_that_passes_messages_uses_its_own_virial(tmp_path):
    """The same file, said to be no Allegro: its stress output must say what the ghosts say."""
    path = rewritten(
        SIX, tmp_path / "messages.pth",
        lambda name, data: no_allegro(data) if name.endswith("extra/config") else data,
    )  # fmt: skip
    assert not read_card(path).strictly_local
    structures = from_ase([atoms for name, atoms, _ in references(SIX) if name in {"crystal", "double"}])
    one, other = load(SIX).evaluate(structures), load(path).evaluate(structures)
    assert one.forces == pytest.approx(other.forces, abs=1e-12)
    assert one.virial == pytest.approx(other.virial, abs=1e-11)
    assert one.energy == pytest.approx(other.energy, abs=1e-9)


def test_a_model_that_passes_messages_needs_one(tmp_path):
    path = rewritten(
        LEGATO, tmp_path / "messages.pth",
        lambda name, data: no_allegro(data) if name.endswith("extra/config") else data,
    )  # fmt: skip
    with pytest.raises(ModelError, match="has no stress output, so it has no virial") as caught:
        load(path)
    assert "StressForceOutput" in caught.value.fix


def test_loading_a_deployed_model_leaves_torch_as_it_was():
    before = torch.get_default_dtype()
    load(LEGATO).evaluate(from_ase([crystal()]))
    assert torch.get_default_dtype() == before


# --- precision ---


def test_precision_is_part_of_the_source(checkpoint):
    source = f"{MODEL}@float64"
    assert parse_models([source]) == {"ammonia-small": source}
    assert parse_models([f"full={source}"]) == {"full": source}
    assert own_name("a/best.ckpt@float32") == "best"
    assert own_name("deployed.pth") == "deployed"
    assert card_of(source).dtype == "float64"
    assert card_of(source).sha256 == card_of(str(MODEL)).sha256 == source_hash(source)
    assert card_of(str(MODEL)).dtype == "float32"
    assert absolute(source) == source
    assert card_of(f"{checkpoint}@float32").dtype == "float32"
    for bad in (f"{MODEL}@half", f"{MODEL}@float64@float32", "mine.py:maker@float64"):
        with pytest.raises(InputError):
            parse_models([bad])


def test_a_checkpoint_in_another_precision(checkpoint):
    structures = from_ase([triclinic()])
    double = load(checkpoint, compiled=False).evaluate(structures)
    single = load(checkpoint, compiled=False, precision="float32")
    assert (single.card.dtype, single.form) == ("float32", "eager, float32")
    error = abs(single.evaluate(structures).forces - double.forces).max()
    assert 1e-9 < error < 1e-5


def test_precisions_that_a_file_cannot_have(given):
    for path, precision in ((given, "float64"), (LEGATO, "float64"), (SIX, "float32")):
        with pytest.raises(ModelError, match="cannot be changed"):
            load(path, precision=precision)
    assert load(SIX, precision="float64").card.dtype == "float64"
    with pytest.raises(ModelError, match="TF32 is a precision of NVIDIA GPUs"):
        load(MODEL, compiled=False, precision="tf32")
    with pytest.raises(ModelError, match="no precision 'half'"):
        load(MODEL, precision="half")


def test_precision_and_checkpoints_have_compiled_forms_of_their_own(checkpoint, monkeypatch, tmp_path):
    """What decides about the machine code is in the name under which it is kept."""
    made = []
    monkeypatch.setenv("NNQMD_CACHE", str(tmp_path))

    def stand_in(path, card, device, target):
        made.append((target.name, card.dtype))
        return None, "eager: no compiler in this test"

    monkeypatch.setattr(compiling, "_compile", stand_in)
    for path, precision in ((MODEL, None), (MODEL, "float64"), (checkpoint, None), (checkpoint, "float32")):
        load(path, precision=precision)
    assert [dtype for _, dtype in made] == ["float32", "float64", "float64", "float32"]
    names = [name for name, _ in made]
    assert len(set(names)) == 4
    assert all(f"torch{torch.__version__.split('+')[0]}" in name for name in names)
    assert all("nequip0" in name for name in names[2:])


@pytest.mark.slow
@pytest.mark.timeout(1500)  # a compilation, on a machine that may do other things too
def test_a_checkpoint_is_compiled_without_its_training_data(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("NNQMD_CACHE", str(tmp_path))
    structures = from_ase([crystal(), triclinic()])
    fast = load(checkpoint)
    assert fast.form == "compiled for cpu"
    slow = load(checkpoint, compiled=False)
    one, other = fast.evaluate(structures), slow.evaluate(structures)
    assert one.forces == pytest.approx(other.forces, abs=1e-12)
    assert one.properties["dipole"] == pytest.approx(other.properties["dipole"], abs=1e-12)
    (file,) = tmp_path.glob("*.pt2")
    card = read_card(file)  # handed on, it says all that the checkpoint says
    assert card.carriers == {"N": 8}
    assert card.strictly_local
    assert load(file).evaluate(structures).properties["dipole"] == pytest.approx(
        other.properties["dipole"], abs=1e-12
    )


# --- errors ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file(files, form, share, tmp_path):
    path = tmp_path / files[form].name
    data = files[form].read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    for use in (read_card, load):
        with pytest.raises(ModelError, match=r"is not a model|is a zip file but") as caught:
            use(path)
        assert path.name in caught.value.what
        assert caught.value.fix


@pytest.mark.parametrize("form", FORMS)
def test_a_file_whose_contents_are_spoilt(files, form, tmp_path):
    """One byte of everything that is read is wrong; the zip's own check sums find it."""
    path = tmp_path / files[form].name
    data = bytearray(files[form].read_bytes())
    with zipfile.ZipFile(files[form]) as archive:
        # What the card is made of, in the file itself.
        needed = {
            "package": "model/config.yaml", "checkpoint": "data.pkl",
            "compiled": "_metadata.json", "torchscript": "extra/r_max",
        }[form]  # fmt: skip
        for item in archive.infolist():
            if item.filename.endswith(needed):
                name, extra = struct.unpack_from("<HH", data, item.header_offset + 26)
                data[item.header_offset + 30 + name + extra] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ModelError, match="is not a model"):
        read_card(path)


@pytest.mark.parametrize(
    ("form", "ending"),
    [("package", "eager_model.pkl"), ("compiled", ".so"), ("torchscript", "data.pkl")],
)
def test_a_network_that_is_spoilt(files, form, ending, tmp_path):
    """The card can be read, the network cannot: found when it is loaded."""
    path = rewritten(
        files[form],
        tmp_path / files[form].name,
        lambda name, data: b"spoilt" if name.endswith(ending) else data,
    )
    read_card(path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(path, compiled=False)


def test_weights_of_a_checkpoint_that_are_missing(checkpoint, tmp_path):
    path = rewritten(
        checkpoint, tmp_path / "best.ckpt", lambda name, data: None if "/data/" in name else data
    )
    read_card(path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(path, compiled=False)


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["torch.save", "torch.save, old format", "pickle"])
@pytest.mark.parametrize("name", ["model.pth", "model.ckpt", "model.nequip.pt2", "model.nequip.zip"])
def test_a_pickle_is_refused_and_not_executed(tmp_path, kind, name):
    path, trace = tmp_path / name, tmp_path / "executed"
    content = {"model": Malice(trace), "state_dict": {"w": torch.zeros(3)}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch.save")
    for use in (form_of, read_card, load):
        with pytest.raises(ModelError, match=r"is a pickle.* not (loaded|read)") as caught:
            use(path)
        if kind == "torch.save":
            assert "touch" in caught.value.what or "getattr" in caught.value.what
    assert not trace.exists()
    # The trap works: this is what would have happened.
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()


def test_tensors_without_a_network(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {"w": torch.zeros(3)}}, path)
    with pytest.raises(ModelError, match="not a checkpoint of nequip"):
        load(path)
    torch.save([torch.zeros(3)], path)
    with pytest.raises(ModelError, match="not a packaged model"):
        load(path)


def test_a_checkpoint_of_an_old_nequip(tmp_path):
    path = tmp_path / "trainer.ckpt"
    torch.save({"state_dict": {}, "config": {"model_builders": ["allegro.model.Allegro"]}}, path)
    with pytest.raises(ModelError, match=r"not a checkpoint of nequip 0.7 or newer") as caught:
        read_card(path)
    assert "nequip-deploy" in caught.value.fix


def test_torchscript_of_another_program(tmp_path):
    path = tmp_path / "other.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ModelError, match="is TorchScript, but not of nequip-deploy"):
        load(path)


def test_torchscript_of_a_newer_nequip(tmp_path):
    path = tmp_path / "newer.nequip.pth"
    extras = {"r_max": "4.0", "type_names": "H N", "num_types": "2", "model_dtype": "float32"}
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path, _extra_files=extras)
    with pytest.raises(ModelError, match=r"nequip 0\.7 or newer, which is not supported"):
        load(path)


def test_a_compiled_model_of_another_program_or_target(given, tmp_path):
    def changed(**texts):
        def change(name, data):
            if not name.endswith("_metadata.json"):
                return data
            said = {k: v for k, v in (json.loads(data) | texts).items() if v is not None}
            return json.dumps(said).encode()

        return rewritten(given, tmp_path / "changed.nequip.pt2", change)

    with pytest.raises(ModelError, match="not by nequip-compile"):
        load(changed(type_names=None))
    with pytest.raises(ModelError, match="not compiled for batches: it takes atom_types cell"):
        load(changed(nequip_aoti_inputs="pos edge_index atom_types cell edge_cell_shift"))
    with pytest.raises(ModelError, match="lacks an entry"):
        load(changed(r_max="far"))
    with pytest.raises(ModelError, match="lacks an entry"):
        load(changed(**{CARD_KEY: "[]"}))
    for key, value, words in (
        ("AOTI_DEVICE_KEY", "cuda", "compiled for cuda, and this is cpu"),
        ("AOTI_MACHINE", "sparc", "compiled for sparc"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            load(changed(**{key: value}))
        assert "Give the package" in caught.value.fix


def test_a_compiled_model_for_a_better_processor(monkeypatch, tmp_path):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    texts = {"AOTI_DEVICE_KEY": "cpu", "AOTI_MACHINE": "x86_64", "AOTI_CPU_ISA": "AVX512 AVX512_VNNI"}
    for has, fits in (("AVX512", True), ("AVX2", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda has=has: has)
        if fits:
            check_hardware(tmp_path, texts, "cpu")
        else:
            with pytest.raises(ModelError, match=f"compiled for AVX512, and this is {has}"):
                check_hardware(tmp_path, texts, "cpu")
        check_hardware(tmp_path, texts | {"AOTI_CPU_ISA": ""}, "cpu")
    check = {"AOTI_DEVICE_KEY": "cuda", "AOTI_MACHINE": "x86_64", "AOTI_COMPUTE_CAPABILITY": "90"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_hardware(tmp_path, check, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(
        ModelError, match="compiled for compute capability 90, and this is compute capability 80"
    ):
        check_hardware(tmp_path, check, "cuda")


def test_a_name_that_contradicts_the_contents(checkpoint, tmp_path):
    path = tmp_path / "model.zip"
    shutil.copy(MODEL, path)
    with pytest.raises(ModelError, match="is a package, and its name says something else"):
        load(path, compiled=False)
    path = tmp_path / "best.nequip.zip"
    shutil.copy(checkpoint, path)
    with pytest.raises(ModelError, match="is a checkpoint, and its name says something else"):
        load(path, compiled=False)


def test_a_missing_file(tmp_path):
    for name in ("none.nequip.zip", "none.ckpt", "none.nequip.pt2", "none.pth"):
        for use in (read_card, load):
            with pytest.raises(ModelError, match=f"There is no model file .*{name}"):
                use(tmp_path / name)


@pytest.mark.parametrize("form", FORMS)
def test_the_hash_of_every_form_is_checked(files, form):
    source = str(files[form])
    check_hashes({"m": source}, {"m": read_card(source).sha256})
    with pytest.raises(ModelError, match=r"has the SHA-256 [0-9a-f]{64}; wanted was 000"):
        check_hashes({"m": source}, {"m": "0" * 64})


@pytest.mark.parametrize("form", FORMS)
def test_an_element_that_a_model_of_any_form_does_not_know(files, form):
    atoms = crystal()
    atoms.symbols[0] = "O"
    with pytest.raises(UnknownElementError, match="does not know O; it knows"):
        load(files[form], compiled=False).evaluate(from_ase([atoms]))


def test_a_network_that_gives_nan(toys, tmp_path):  # noqa: F811
    """From the model to the user: the pool names the structures, and no number gets out."""
    _, client, add, ready, _ = toys
    path = tmp_path / "nan.pth"
    change = b"".join(struct.pack("<f", float("nan")) for _ in range(8))
    changed = []

    def spoil(name, data):
        # A bias or weight in float32, in whatever storage stands first.
        stored = "/constants/" in name or "/data/" in name
        if stored and len(data) >= 32 and len(data) % 4 == 0 and not changed:
            changed.append(name)
            return change + data[32:]
        return data

    rewritten(LEGATO, path, spoil)
    assert changed
    bad = load(path)
    assert np.isnan(bad.evaluate(from_ase([crystal()])).forces).any()
    for worker in (1, 2):
        add(worker, evaluate=bad.evaluate)
    ready(2)
    with pytest.raises(StructureError, match="not finite") as caught:
        client.submit(from_ase([crystal()]))
    assert caught.value.suspects == (0,)
    assert caught.value.fix
