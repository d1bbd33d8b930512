"""`nnqmd label`: nothing is computed twice, nothing that fails stops the rest, and CP2K's numbers."""

import importlib.util
import json
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read, write
from labelling import CRASHING, FAILING, SLOW
from typer.testing import CliRunner

from nnqmd_server.cli import app
from nnqmd_server.errors import DataError, InputError, ProgramError
from nnqmd_server.labels import cp2k_input, label
from nnqmd_server.labels.codes import parse_code
from nnqmd_server.labels.structures import read_structures

HERE = Path(__file__).parent
SHIPPED = HERE.parents[0] / "examples/ammonia/data/ammonia_train.xyz"
MAKER = f"{HERE / 'labelling.py'}:told"


def copper(*marks):
    """Small copper crystals; the largest coordinate of each is a mark that the calculator knows."""
    frames = []
    for mark in marks:
        atoms = bulk("Cu", cubic=True)
        atoms.positions[3] = (0.1, 0.05, mark)
        frames.append(atoms)
    return frames


def prepare(tmp_path, *marks):
    path = tmp_path / "cu.xyz"
    write(path, copper(*marks))
    return path, tmp_path / "calls.txt", tmp_path / "labels.xyz"


def labelled(path, log, out, *more, seconds=0.0):
    code = f"{MAKER},log={log},seconds={seconds}"
    return CliRunner().invoke(
        app, ["label", str(path), "--with", code, "--out", str(out), "--workers", "2", *more]
    )


def test_labels_are_the_calculators_and_computed_once(tmp_path):
    path, log, out = prepare(tmp_path, 2.1, 2.2, 2.3)
    result = labelled(path, log, out)
    assert result.exit_code == 0, result.output
    frames = read(out, ":")
    for frame, atoms in zip(frames, copper(2.1, 2.2, 2.3), strict=True):
        atoms.calc = EMT()
        assert frame.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
        assert np.abs(frame.get_forces() - atoms.get_forces()).max() < 2e-8
        assert np.abs(frame.get_stress() - atoms.get_stress()).max() < 1e-12
        assert frame.info["config_type"] == "cu"
    assert [frame.info["source_id"] for frame in frames] == [f"cu_f00000{k}" for k in range(3)]
    note = json.loads(out.with_suffix(".json").read_text())
    assert note["frames"] == 3
    assert note["failed"] == []
    first = out.read_bytes()
    write(path, copper(2.3, 2.4, 2.1, 2.2, 2.4))  # another order, one more, one twice
    result = labelled(path, log, out, "--workers", "1")
    assert "3 labelled before" in result.output
    assert "1 structures are the same" in result.output
    assert sorted(log.read_text().split()) == ["2.1", "2.2", "2.3", "2.4"]
    assert [f"{f.positions.max():.1f}" for f in read(out, ":")] == ["2.3", "2.4", "2.1", "2.2"]
    assert out.read_bytes() != first


def test_failures_and_crashes_stop_nothing_and_are_listed(tmp_path):
    path, log, out = prepare(tmp_path, FAILING, 2.1, CRASHING, 2.2, 2.3)
    result = labelled(path, log, out)
    assert result.exit_code == 3, result.output
    assert "cu_f000000: RuntimeError: the SCF did not converge" in result.output
    assert "cu_f000002: its process ended with signal SIGABRT" in result.output
    assert [f.info["source_id"][-1] for f in read(out, ":")] == ["1", "3", "4"]
    again = labelled(path, log, out)
    assert "2 failed before (--retry tries them again)" in again.output
    work = label.plan(read_structures([path]), parse_code(f"{MAKER},log={log},seconds=0.0"), out, retry=True)
    assert len(work.todo) == 2
    assert len(log.read_text().split()) == 3
    failed = json.loads(out.with_suffix(".json").read_text())["failed"]
    assert [entry["frame"] for entry in failed] == ["cu_f000000", "cu_f000002"]


@pytest.mark.slow
def test_a_frame_that_hangs_is_ended(tmp_path):
    path, log, out = prepare(tmp_path, SLOW, 2.1, 2.2)
    code = parse_code(f"{MAKER},log={log}")
    work = label.plan(read_structures([path]), code, out)
    outcome = label.run(work, workers=2, limit=8.0)
    assert [reason for _, reason in outcome.failures] == ["it took longer than 8 s"]
    assert len(outcome.frames) == 2


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    marks = [2.0 + 0.01 * k for k in range(6)]
    path, log, out = prepare(tmp_path, *marks)
    command = [sys.executable, "-m", "nnqmd_server", "label", str(path), "--workers", "1", "--out", str(out)]
    command += ["--with", f"{MAKER},log={log},seconds=0.5"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        kept = tmp_path / "labels.work/frames"
        deadline = time.monotonic() + 120
        while (
            process.poll() is None and time.monotonic() < deadline and len(list(kept.glob("[!.]*.xyz"))) < 2
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    result = labelled(path, log, out, seconds=0.5)
    assert int(re.search(r"(\d+) labelled before", result.output)[1]) >= 2
    # the worker of the killed run finishes the frame that it has: that one may be computed twice
    assert 6 <= len(log.read_text().split()) <= 7
    assert len(read(out, ":")) == 6


def test_other_settings_are_other_labels(tmp_path):
    atoms = copper(2.1)[0]
    plain = parse_code("ase:ase.calculators.emt.EMT")
    other = parse_code("ase:ase.calculators.emt.EMT,asap_cutoff=true")
    moved = atoms.copy()
    moved.positions[0, 0] += 1e-8
    assert plain.identity(atoms) == plain.identity(atoms.copy())
    assert len({plain.identity(atoms), other.identity(atoms), plain.identity(moved)}) == 3


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("abinit", InputError, "not a code"),
        ("ase:ase.calculators.emt.EMT,cutoff", InputError, "key=value"),
        ("ase:no_such_package.Thing", ProgramError, "not installed"),
        ("ase:ase.calculators.emt.NoSuch", InputError, "NoSuch"),
        (f"{MAKER},colour=red", InputError, "colour"),
        ("missing.py:make", InputError, r"missing\.py"),
    ],
)
def test_codes_that_cannot_work_are_refused_at_once(text, error, words):
    with pytest.raises(error, match=words) as caught:
        parse_code(text).prepare()
    assert caught.value.fix


# --- structures ---


def bead_file(path, bead, steps, offset):
    rows = []
    for step in steps:
        place = 1.0 + 0.1 * step + offset
        cell, units = "10.0 10.0 10.0 90.0 90.0 90.0", "positions{atomic_unit} cell{atomic_unit}"
        rows += ["2", f"# CELL(abcABC): {cell}  Step: {step} Bead: {bead} {units}"]
        rows += [
            f"       N {place:.5e} 0.00000e+00 0.00000e+00",
            "       H 3.00000e+00 1.00000e+00 0.00000e+00",
        ]
    path.write_text("\n".join(rows) + "\n")


def test_beads_of_a_run_stay_together_in_time(tmp_path):
    run = tmp_path / "solid-100K"
    run.mkdir()
    for bead in (0, 1):
        bead_file(run / f"nh3.pos_{bead}.xyz", bead, range(6), 0.01 * bead)
    frames = read_structures([run / "nh3.pos_0.xyz", run / "nh3.pos_1.xyz"], skip=1, every=2)
    assert {frame.info["config_type"] for frame in frames} == {"solid-100K"}
    bohr = 0.529177210903
    found = [frame.positions[0, 0] / bohr for frame in frames]
    assert np.allclose(found, [1.1, 1.11, 1.3, 1.31, 1.5, 1.51], atol=1e-6)
    assert np.allclose(frames[0].cell.lengths(), 10 * bohr)
    assert len({frame.info["source_id"] for frame in frames}) == 6


def test_two_runs_of_one_name_are_two_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "cu.xyz", copper(2.1))
    frames = read_structures([tmp_path / "a/cu.xyz", tmp_path / "b/cu.xyz"])
    assert [frame.info["config_type"] for frame in frames] == ["cu", "b_cu"]


def test_structures_without_a_cell_or_of_other_quantities_are_refused(tmp_path):
    path = tmp_path / "m.xyz"
    write(path, Atoms("NH", [[0, 0, 0], [1, 0, 0]]))
    with pytest.raises(DataError, match="no periodic cell"):
        read_structures([path])
    bead_file(path, 0, [0], 0.0)
    path.write_text(path.read_text().replace("positions{", "velocities{"))
    with pytest.raises(DataError, match="not positions"):
        read_structures([path])
    bead_file(path, 0, [0], 0.0)
    path.write_text(path.read_text().replace("positions{atomic_unit}", "positions{furlong}"))
    with pytest.raises(DataError, match="furlong"):
        read_structures([path])


# --- CP2K's inputs ---


def ammonia(name="solid16_a506_T100_f003"):
    return next(frame for frame in read(SHIPPED, ":") if frame.info["source_id"] == name)


@pytest.mark.parametrize(
    ("cell", "mesh"),
    [
        ([5.06] * 3, "2 2 2"),
        ([6.93] * 3, "2 2 2"),
        ([4.9] * 3, "3 3 3"),
        ([5.1, 11, 11], "2 1 1"),
        ([11] * 3, ""),
    ],
)
def test_k_points_follow_the_cell(cell, mesh):
    atoms = Atoms("N", cell=cell, pbc=True)
    text = cp2k_input.forces_input(cp2k_input.shipped(cp2k_input.FORCES), atoms, "x", cp2k_input.K_LENGTH)
    assert (f"MONKHORST-PACK {mesh}\n" in text) if mesh else ("&KPOINTS" not in text)


def test_a_users_input_keeps_everything_but_the_structure(tmp_path):
    template = """
&GLOBAL
  PROJECT mine   ! a comment
  RUN_TYPE MD
&END GLOBAL
&FORCE_EVAL
  METHOD QS
  &DFT
    &MGRID
      CUTOFF 450
    &END MGRID
  &END DFT
  &SUBSYS
    &CELL
      ABC 1 2 3
    &END CELL
    &COORD
      He 0 0 0
    &END COORD
    &KIND N
      BASIS_SET DZVP-MOLOPT-SR-GTH
      POTENTIAL GTH-PBE-q5
    &END KIND
  &END SUBSYS
&END FORCE_EVAL
"""
    path = tmp_path / "mine.inp"
    path.write_text(template)
    atoms = Atoms("N", [[1, 2, 3]], cell=[5, 6, 7], pbc=True)
    text = cp2k_input.forces_input(cp2k_input.read_template(path), atoms, "forces", None)
    for line in ("PROJECT forces", "RUN_TYPE ENERGY_FORCE", "CUTOFF 450", "BASIS_SET DZVP-MOLOPT-SR-GTH",
                 "STRESS_TENSOR ANALYTICAL", "&FORCES ON", "B 0.0000000000 6.0000000000 0.0000000000",
                 "N 1.0000000000 2.0000000000 3.0000000000"):  # fmt: skip
        assert text.count(line) == 1, line
    for gone in ("mine", "RUN_TYPE MD", "He 0", "ABC"):
        assert gone not in text
    with pytest.raises(InputError, match="no &KIND for H"):
        cp2k_input.forces_input(template, Atoms("NH", cell=[5] * 3, pbc=True), "x", None)
    path.write_text("@INCLUDE 'other.inp'\n" + template)
    with pytest.raises(InputError, match="@INCLUDE"):
        cp2k_input.read_template(path)
    with_points = template.replace("    &MGRID", "    &KPOINTS\n    &END KPOINTS\n    &MGRID")
    with pytest.raises(InputError, match="Gamma only"):
        cp2k_input.wannier_input(with_points, atoms, "x", 2)


STAND_IN = """#!{python}
import sys
from pathlib import Path
if "--version" in sys.argv:
    print(" CP2K version 2023.1")
    sys.exit()
out = sys.argv[sys.argv.index("-o") + 1]
given = Path(sys.argv[sys.argv.index("-i") + 1]).read_text()
text = Path({answer!r}).read_text()
if "0.9577762600" not in given:
    text = text.replace("SCF run converged in    13 steps", "SCF run NOT converged")
Path(out).write_text(text)
"""


def test_a_scf_that_fails_is_one_failed_frame(tmp_path):
    program = tmp_path / "cp2k"
    program.write_text(STAND_IN.format(python=sys.executable, answer=str(HERE / "data/cp2k-2023-nh3.out")))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    good = ammonia("solid16_a522_T300_f000")
    other = good.copy()
    other.positions[1] += 0.1
    path, out = tmp_path / "two.xyz", tmp_path / "labels.xyz"
    write(path, [other, good])
    arguments = [
        "label",
        str(path),
        "--command",
        str(program),
        "--no-wannier",
        "--out",
        str(out),
        "--workers",
        "1",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3, result.output
    assert "not converged" in result.output
    (frame,) = read(out, ":")
    assert np.abs(frame.get_forces() - good.get_forces()).max() < 2e-8
    assert frame.info["label_code"] == "CP2K 2023.1"
    note = json.loads(out.with_suffix(".json").read_text())
    assert len(note["failed"]) == 1
    assert "&KPOINTS" in note["settings"]["forces_input"]
    assert list((tmp_path / "labels.work/failed").glob("*/forces.out"))


def test_cp2k_that_is_not_there(tmp_path):
    with pytest.raises(ProgramError, match="no program"):
        parse_code("cp2k", command="no-such-cp2k")
    with pytest.raises(ProgramError, match="does not say its version"):
        parse_code("cp2k", command="true")


def test_our_inputs_are_written_to_be_changed(tmp_path):
    result = CliRunner().invoke(app, ["label", "--write-inputs", str(tmp_path / "inputs")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "inputs/cp2k_forces.inp").read_text() == cp2k_input.shipped(cp2k_input.FORCES)


# --- real codes ---


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("cp2k.psmp") is None, reason="needs CP2K (apt-get install cp2k)")
def test_cp2k_reproduces_a_shipped_frame(tmp_path, monkeypatch):
    wanted = ammonia()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write(tmp_path / "one.xyz", Atoms(wanted.numbers, wanted.positions, cell=wanted.cell, pbc=True))
    out = tmp_path / "labels.xyz"
    result = CliRunner().invoke(
        app, ["label", str(tmp_path / "one.xyz"), "--with", "cp2k", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    found = read(out)
    energy = found.get_potential_energy() - wanted.get_potential_energy()
    forces = np.abs(found.get_forces() - wanted.get_forces()).max()
    stress = np.abs(found.get_stress() - wanted.get_stress()).max()
    centroids = np.abs(found.arrays["wannier_centroid"] - wanted.arrays["wannier_centroid"]).max()
    print(f"energy {energy:.1e} eV, forces {forces:.1e} eV/A, stress {stress:.1e} eV/A^3")
    print(f"centroids {centroids:.1e} A")
    same = found.info["label_code"] == "CP2K 2023.1"  # the version that made the shipped labels
    assert abs(energy) < (1e-7 if same else 1e-3)
    assert forces < (1e-6 if same else 2e-3)
    assert stress < (1e-8 if same else 1e-5)
    assert centroids < 1e-3  # the shipped ones were computed without interpolating the orbitals


@pytest.mark.peer
@pytest.mark.skipif(importlib.util.find_spec("tblite") is None, reason="needs tblite")
def test_tblite_labels_are_those_of_its_own_calculator(tmp_path):
    from tblite.ase import TBLite

    frames = [ammonia(), ammonia("solid16_a522_T300_f000")]
    write(tmp_path / "nh3.xyz", [Atoms(f.numbers, f.positions, cell=f.cell, pbc=True) for f in frames])
    out = tmp_path / "labels.xyz"
    result = CliRunner().invoke(
        app, ["label", str(tmp_path / "nh3.xyz"), "--with", "tblite", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    for found, frame in zip(read(out, ":"), frames, strict=True):
        atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=True)
        atoms.calc = TBLite(method="GFN1-xTB", verbosity=0)
        assert found.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        assert np.abs(found.get_forces() - atoms.get_forces()).max() < 1e-5
        assert np.abs(found.get_stress() - atoms.get_stress()).max() < 1e-7
