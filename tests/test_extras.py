"""What i-PI gets beside energies and forces, through every door, as i-PI itself reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ipi.interfaces.utils import parse_extra
from spring_potential import CHARGE, MEMBERS, PROPERTIES, SPRING, SpringPotential
from springs import (
    NUMBERS,
    POSITIONS,
    Springs,
    answer,
    direct_door,
    positions,
    spring_pool,
    start_ipi,
    write_input,
)
from test_sockets import force_field, place

from nnqmd_server.doors.extras import EXTRAS, check_extras, extras_of
from nnqmd_server.doors.force_sets import from_results, to_structures
from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.structures import Results
from nnqmd_server.units import BOHR

BEADS, STEPS = 3, 4
WANTED = " ".join(EXTRAS)
FILES = POSITIONS + "".join(
    f"<trajectory filename='{name}' stride='1' extra_type='{name}'> extras </trajectory>" for name in EXTRAS
)


def of_positions(q):
    """Every extra of one frame of one bead, from positions [bohr] (n_atoms, 3), in i-PI's units."""
    energy, virial = 0.5 * SPRING * (q**2).sum(), -SPRING * q.T @ q
    return {
        "dipole": q[0],
        "charges": CHARGE * BOHR * q[:, 1],
        # rows of atom and displacement, columns of the dipole
        "BEC": CHARGE * BOHR * (np.arange(1, 4)[:, None] * q[:, None, :]).reshape(-1, 3),
        "committee_pot": energy * MEMBERS,
        "committee_force": -SPRING * MEMBERS[:, None] * q.reshape(-1),
        "committee_virial": MEMBERS[:, None] * virial.reshape(-1),
    }


def read_extras(path, rows, steps=STEPS):
    """An extras file of i-PI: (n_frames, rows, columns)."""
    lines = [line for line in path.read_text().splitlines() if "#" not in line]
    table = np.array([line.split() for line in lines], dtype=float)
    return table.reshape(steps + 1, rows, -1)


def assert_extras(folder, steps=STEPS):
    """i-PI has printed, for every bead and step, what belongs to the positions that it printed."""
    q = positions(folder, BEADS)
    for name in EXTRAS:
        rows = len(MEMBERS) if name in {"committee_force", "committee_virial"} else 1
        rows = 3 * q.shape[2] if name == "BEC" else rows
        for bead in range(BEADS):
            got = read_extras(folder / f"run.{name}_{bead}", rows, steps)
            for frame in range(steps + 1):
                expected = np.atleast_2d(of_positions(q[frame, bead])[name])
                assert got[frame].shape == expected.shape
                # Positions are printed with six digits.
                assert got[frame] == pytest.approx(expected, rel=5e-5, abs=5e-5 * np.abs(expected).max())
    beads = [(folder / f"run.dipole_{bead}").read_text() for bead in range(BEADS)]
    assert len(set(beads)) == BEADS


@pytest.mark.parametrize(
    ("mode", "batch"),
    [
        ("unix", 1),
        pytest.param("inet", 1, marks=pytest.mark.slow),
        pytest.param("unix", BEADS, marks=pytest.mark.slow),
        ("shm", BEADS),
    ],
)
def test_ipi_reads_the_extras_of_every_bead_over_sockets(tmp_path, mode, batch):
    address, named = place(mode, f"x{batch}")
    ipi = start_ipi(write_input(tmp_path, force_field(mode, named, batch), BEADS, STEPS, FILES))
    answer(address, ipi, Springs(), BEADS, batch, extras=tuple(EXTRAS))
    assert_extras(tmp_path)


def test_ipi_reads_the_extras_of_every_bead_through_the_direct_door(tmp_path):
    source = write_input(tmp_path, direct_door(BEADS, f", extras: {WANTED}"), BEADS, STEPS, FILES)
    with spring_pool(tmp_path / "pool") as pool:
        assert start_ipi(source, pool=pool.address).wait(60) == 0, (tmp_path / "i-pi.log").read_text()
    assert_extras(tmp_path)


@pytest.mark.parametrize("door", ["direct", pytest.param("unix", marks=pytest.mark.slow)])
def test_ipis_own_committee_takes_its_members_from_our_extras(tmp_path, door):
    """<ffcommittee> with parse_json: mean, uncertainty and forces of the members, and the same dynamics."""
    address, named = place("unix", "committee")
    if door == "direct":
        member = direct_door(BEADS, f", extras: {WANTED}").replace("name='springs'", "name='one'")
    else:
        member = force_field("unix", named, BEADS).replace("name='springs'", "name='one'")
    files = POSITIONS + "".join(
        f"<trajectory filename='{name}' stride='1' extra_type='{name}'> extras </trajectory>"
        for name in ("committee_pot", "committee_force", "committee_dipole")
    )
    committee = f"<ffcommittee name='springs'> <parse_json>true</parse_json> {member} </ffcommittee>"
    source = write_input(tmp_path / "committee", committee, BEADS, STEPS, files)
    with spring_pool(tmp_path / "pool") as pool:
        ipi = start_ipi(source, pool=pool.address)
        if door == "direct":
            assert ipi.wait(60) == 0, (source.parent / "i-pi.log").read_text()
        else:
            answer(address, ipi, Springs(), BEADS, BEADS, extras=tuple(EXTRAS))
    q = positions(source.parent, BEADS)
    for bead in range(BEADS):
        pot = read_extras(source.parent / f"run.committee_pot_{bead}", 1)[:, 0]
        force = read_extras(source.parent / f"run.committee_force_{bead}", len(MEMBERS))
        dipole = read_extras(source.parent / f"run.committee_dipole_{bead}", 1)[:, 0]
        for frame in range(STEPS + 1):
            expected = of_positions(q[frame, bead])
            assert pot[frame] == pytest.approx(expected["committee_pot"], rel=5e-5)
            assert force[frame] == pytest.approx(expected["committee_force"], rel=5e-5, abs=1e-4)
            assert dipole[frame] == pytest.approx(expected["dipole"], rel=5e-5, abs=1e-4)
    # The members' mean is the whole: i-PI moves as it does with its own springs.
    own = """<ffdirect name='springs'> <pes>harmonic</pes> <parameters>{k1: 0.02}</parameters> </ffdirect>"""
    assert start_ipi(write_input(tmp_path / "own", own, BEADS, STEPS, POSITIONS)).wait(60) == 0
    assert q == pytest.approx(positions(tmp_path / "own", BEADS), rel=1e-10, abs=1e-10)
    reweight(source.parent)


def reweight(folder):
    """i-PI's own tool reads the members' energies; at this kT all weights are the same."""
    np.savetxt(folder / "observable", np.arange(STEPS + 1.0))
    tool = Path(sys.executable).parent / "i-pi-committee-reweight"
    command = [sys.executable, tool, "run.committee_pot_0", "observable", "--kt", "1e9"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    row = [float(word) for word in done.stdout.splitlines()[-1].split()]
    assert row == pytest.approx([STEPS / 2, 0.0] + [STEPS / 2] * len(MEMBERS), abs=1e-6), done.stdout


def results_of(count):
    rng = np.random.default_rng(count)
    q = rng.normal(size=(count, len(NUMBERS), 3))
    structures = to_structures(NUMBERS, [np.eye(3)] * count, list(q))
    return q, structures, SpringPotential().evaluate(structures)


def test_the_text_is_what_ipi_parses_and_has_nothing_that_was_not_asked_for():
    q, _, results = results_of(2)
    assert [text for *_, text in from_results(results)] == ["", ""]
    assert parse_extra("") == {}
    for k, text in enumerate(extras_of(results, ["charges", "committee_force"])):
        found = parse_extra(text)
        assert set(found) == {"charges", "committee_force", "raw"}  # "raw" is i-PI's
        assert found["charges"] == pytest.approx(of_positions(q[k])["charges"], rel=1e-12)
        assert np.array(found["committee_force"]) == pytest.approx(
            of_positions(q[k])["committee_force"], rel=1e-12
        )


def test_no_extra_has_a_name_that_ipi_keeps_for_itself():
    """``raw`` (ValueError in i-PI), and what <ffcommittee> would take for its own results."""
    clashes = {"raw", "pot", "force", "virial", "uncertainty"}
    assert not clashes & set(EXTRAS)
    with pytest.raises(ValueError, match="raw"):
        parse_extra(json.dumps({"raw": 1}))


@pytest.mark.parametrize(
    ("asked", "properties", "words"),
    [
        (["raw"], PROPERTIES, "no extras raw"),
        (["dipole", "charge"], PROPERTIES, "no extras charge"),
        (["charges"], ("dipole",), "cannot give the extras charges"),
        (["dipole"], (), "cannot give the extras dipole"),
    ],
)
def test_what_cannot_be_given_is_an_error_in_words(asked, properties, words):
    with pytest.raises(InputError, match=words) as error:
        check_extras(asked, {"name": "m", "properties": list(properties)})
    assert error.value.fix


def test_a_model_that_breaks_its_promise_is_named():
    _, _, results = results_of(2)
    bare = Results(results.energy, results.forces, results.virial)
    with pytest.raises(ModelError, match="promises charge, and it gave none"):
        extras_of(bare, ["charges"])
    wrong = Results(results.energy, results.forces, results.virial, {"dipole": np.zeros(2)})
    with pytest.raises(ModelError, match=r"promises dipole, and it gave one of shape \(2,\)"):
        extras_of(wrong, ["dipole"])
