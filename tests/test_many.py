"""Many force fields and systems in one input: real i-PI with our doors, against i-PI's own ``harmonic``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase.data import atomic_masses
from springs import frames, own_drivers, start_ipi
from two_springs import SOFT, STIFF

from nnqmd_server.cli.serve_sockets import read_sockets
from nnqmd_server.doors.extras import share_extras
from nnqmd_server.doors.template import read_numbers
from nnqmd_server.errors import InputError, ProgramError
from nnqmd_server.inputs.mpi_run import MpiRun, RankOptions, find_mpiexec, is_over_mpi
from nnqmd_server.inputs.run import Run, check, find_ipi, make_folder
from nnqmd_server.pool.launch import LocalPool
from nnqmd_server.units import AMU_IN_ELECTRON_MASSES, ATOMIC_TIME, BOHR

POTENTIALS = Path(__file__).with_name("two_springs.py")
MODELS = {"soft": f"{POTENTIALS}:soft", "stiff": f"{POTENTIALS}:stiff"}
PES = Path(__file__).parents[1] / "ipi_inputs/ammonia-solid-trpmd/nnqmd_pes.py"
BEADS, STEPS = 4, 10
PRINTED = 1e-5  # bohr: i-PI prints positions with 6 digits


@pytest.fixture(scope="module")
def springs_pool(tmp_path_factory):
    with LocalPool(MODELS, tmp_path_factory.mktemp("logs"), workers=2, device="cpu") as running:
        running.wait_ready(timeout=60)
        yield running


def direct(name, spring=None, beads=BEADS, more="template: n.xyz"):
    """One of our direct doors; with a spring, i-PI's own potential in its place."""
    if spring is not None:
        return (
            f"<ffdirect name='{name}'><pes>harmonic</pes><parameters>{{k1: {spring}}}</parameters></ffdirect>"
        )
    return (
        f"<ffdirect name='{name}'><pes>custom</pes><pes_path>{PES}</pes_path>"
        f"<batch_size>{beads}</batch_size><parameters>{{{more}}}</parameters></ffdirect>"
    )


def over(mode):
    """A function that makes force fields of ours: direct ones, or sockets of some kind."""

    def field(name, beads=BEADS, inside=""):
        if mode.startswith("direct"):
            threads = "threaded='True' " if mode == "direct-threaded" else ""
            return direct(name, beads=beads).replace("<ffdirect ", f"<ffdirect {threads}")
        kind, _, batched = mode.partition("-")
        size = f"<batch_size>{beads}</batch_size>" if batched else ""
        where = f"<address>many-{os.getpid()}-{name}</address>"
        if kind == "inet":
            port = 21000 + os.getpid() % 20000 + len(name)
            where = f"<address>localhost</address><port>{port}</port>"
        return f"<ffsocket name='{name}' mode='{kind}'>{where}{size}{inside}</ffsocket>"

    return field


def doors(*quick):
    """Every kind of door; what is not quick is slow."""
    kinds = ["direct", "direct-threaded", "unix", "unix-batched", "shm-batched", "inet"]
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def system(forces, prefix="", init="n.xyz", dynamics="", beads=BEADS):
    return f"""<system prefix='{prefix}'>
  <initialize nbeads='{beads}'>
    <file mode='xyz'>{init}</file> <velocities mode='thermal' units='kelvin'>300</velocities>
  </initialize>
  <forces> {forces} </forces>
  <ensemble> <temperature units='kelvin'>300</temperature> </ensemble>
  <motion mode='dynamics'><fixcom>False</fixcom><dynamics mode='nve' splitting='baoab'>
    <timestep units='femtosecond'>0.5</timestep> {dynamics}
  </dynamics></motion>
</system>"""


def write(folder, fields, systems, steps=STEPS, more=""):
    """An input in a folder of its own, with a crystallite of nitrogen and one of helium atoms."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    for name, element, atoms in (("n", "N", 5), ("he", "He", 3)):
        rows = [f"{element} {x:.6f} {y:.6f} {z:.6f}" for x, y, z in rng.normal(size=(atoms, 3))]
        comment = "# CELL(abcABC): 20 20 20 90 90 90 Step: 0 Bead: 0 positions{angstrom} cell{angstrom}"
        (folder / f"{name}.xyz").write_text("\n".join([str(atoms), comment, *rows]) + "\n")
    path = folder / "input.xml"
    path.write_text(
        f"""<simulation verbosity='medium' safe_stride='1000' floatformat='%20.12e'>
<output prefix='run'>
  <properties filename='out' stride='1'> [ step, conserved, temperature, potential ] </properties>
  <trajectory filename='pos' stride='1' format='xyz'> positions </trajectory>
</output>
<total_steps>{steps}</total_steps> <prng><seed>31415</seed></prng>
{fields} {systems} {more}
</simulation>"""
    )
    return path


@contextlib.contextmanager
def by_itself(path, pool=""):
    """A run of i-PI without `nnqmd run`, meanwhile; it has ended when it is asked for its folder."""
    ipi = start_ipi(path, Path(find_ipi()), pool)

    def folder():
        assert ipi.wait(60) == 0, (path.parent / "i-pi.log").read_text()
        return path.parent

    try:
        yield folder
    finally:
        ipi.kill()
        ipi.wait()


def run(path, pool, **options):
    folder = path.parent / "run"
    make_folder(folder, force=False)
    before = pool.status().structures
    job = Run(path, folder, pool.address, **options)
    try:
        job.wait(lambda: None, interval=0.05)
    finally:
        job.stop()
    job.structures = pool.status().structures - before
    return job


def trajectory(folder, prefix="", atoms=5, beads=BEADS):
    """Positions [bohr] of every bead, (n_frames, n_beads, n_atoms, 3)."""
    start = f"{prefix}_" * bool(prefix)
    return np.stack([frames(folder / f"{start}run.pos_{k}.xyz", atoms) for k in range(beads)], axis=1)


def assert_same(mine, other, prefix="", atoms=5):
    """The same trajectory, as far as it is printed, and the same energies to round-off."""
    expected = trajectory(other, prefix, atoms)
    assert trajectory(mine, prefix, atoms) == pytest.approx(expected, rel=0, abs=PRINTED)
    assert np.ptp(expected, axis=0).max() > 0.05
    tables = [np.loadtxt(folder / f"{prefix + '_' if prefix else ''}run.out") for folder in (mine, other)]
    assert len(tables[0]) == STEPS + 1
    assert tables[0] == pytest.approx(tables[1], rel=1e-9)


def dipoles(path):
    with h5py.File(path) as file:
        assert file["force_set"][:].tolist() == list(range(STEPS + 1))
        return file["dipole"][:] / BOHR


# ---- several force fields


CONTRACTED = (
    "<force forcefield='soft'><mts_weights>[1, 0]</mts_weights></force>"
    "<force forcefield='stiff' nbeads='2'><mts_weights>[0, 1]</mts_weights></force>"
)


@pytest.mark.parametrize("mode", doors("direct", "unix"))
def test_multiple_time_steps_and_ring_polymer_contraction(springs_pool, tmp_path, mode):
    """Two force fields, each with its own potential, beads and rhythm."""
    one = system(CONTRACTED, dynamics="<nmts>[1, 3]</nmts>")
    field = over(mode)
    with by_itself(write(tmp_path / "ipi", direct("soft", SOFT) + direct("stiff", STIFF), one)) as other:
        mine = run(write(tmp_path / "our", field("soft") + field("stiff", 2), one), springs_pool)
        assert_same(mine.folder, other())
    parts = {part.potential: part for part in mine.parts}
    assert (parts["soft"].force.n_beads, parts["soft"].force.per_step) == (BEADS, 1)
    assert (parts["stiff"].force.n_beads, parts["stiff"].force.per_step) == (2, 3)
    # Nothing is computed twice; beads that all start in one place and fill up a batch, once.
    whole = (BEADS + 2) + STEPS * (BEADS + 3 * 2)
    assert whole - (BEADS if "batched" in mode else 0) <= mine.structures <= whole
    assert mine.steps_done(whole) == STEPS
    # The stiff one is asked more than once in a step: which of its force sets are steps is not recorded.
    assert not list(mine.folder.glob("dipoles*"))


def test_a_force_field_that_two_forces_share_is_doubled(springs_pool, tmp_path):
    """Four beads for one force, two for the other: one <ffdirect> could not have both as its batch_size."""
    forces = (
        "<force forcefield='stiff' weight='0.5'/><force name='far' forcefield='stiff' nbeads='2'/>"
        "<force forcefield='soft'/>"
    )
    own = direct("stiff", STIFF) + direct("soft", SOFT)
    with by_itself(write(tmp_path / "ipi", own, system(forces))) as other:
        path = write(tmp_path / "our", direct("stiff") + direct("soft"), system(forces))
        mine = run(path, springs_pool)
        assert_same(mine.folder, other())
        expected = trajectory(other())[:, :, 0]
    assert [part.field.name for part in mine.parts] == ["stiff-force1", "stiff-far", "soft"]
    assert [part.force.n_beads for part in mine.parts] == [BEADS, 2, BEADS]
    # The dipoles of all beads are those that a spectrum is made from.
    assert dipoles(mine.folder / "dipoles.h5") == pytest.approx(expected, rel=0, abs=PRINTED)
    assert dipoles(mine.folder / "dipoles-stiff-far.h5").shape == (STEPS + 1, 2, 3)


@pytest.mark.slow
def test_a_committee_of_two_potentials(springs_pool, tmp_path):
    """i-PI's own committee, whose members are doors of ours: the mean of the two springs."""
    one = system("<force forcefield='c'/>")
    committee = f"<ffcommittee name='c'>{direct('soft')}{direct('stiff')}</ffcommittee>"
    with by_itself(write(tmp_path / "ipi", direct("c", (SOFT + STIFF) / 2), one)) as other:
        mine = run(write(tmp_path / "our", committee, one), springs_pool)
        assert_same(mine.folder, other())
        expected = trajectory(other())[:, :, 0]
    assert dipoles(mine.folder / "dipoles.h5") == pytest.approx(expected, rel=0, abs=PRINTED)


# ---- several systems


BOTH = "<force forcefield='stiff'/>"


@pytest.mark.parametrize("mode", doors("shm-batched"))
def test_two_systems_of_other_elements_and_sizes_share_a_force_field(springs_pool, tmp_path, mode):
    pair = system(BOTH, "nitrogen") + system(BOTH, "helium", "he.xyz")
    each = pair.replace("'stiff'", "'n'", 1).replace("'stiff'", "'he'", 1)
    fields = direct("n", STIFF) + direct("he", 2 / 7 * STIFF)
    with by_itself(write(tmp_path / "ipi", fields, each)) as other:
        mine = run(write(tmp_path / "our", over(mode)("stiff"), pair), springs_pool)
        for prefix, atoms in (("nitrogen", 5), ("helium", 3)):
            assert_same(mine.folder, other(), prefix, atoms)
            # Each system has its own record, though their threads fill the queues in any order.
            recorded = dipoles(mine.folder / f"dipoles-stiff-{prefix}.h5")
            expected = trajectory(other(), prefix, atoms)[:, :, 0]
            assert recorded == pytest.approx(expected, rel=0, abs=PRINTED)
    whole = 2 * BEADS * (STEPS + 1)
    assert mine.steps_done(whole) == STEPS
    assert whole - (2 * BEADS if "batched" in mode else 0) <= mine.structures <= whole


def test_replica_exchange_from_a_system_template_and_its_restart(springs_pool, tmp_path):
    template = system(BOTH, "repLABEL").replace(
        "<temperature units='kelvin'>300", "<temperature units='kelvin'>KELVIN"
    )
    instances = "".join(f"<instance> [{k}, {300 + 100 * k}] </instance>" for k in range(3))
    systems = (
        f"<system_template><template>{template}</template><labels> [LABEL, KELVIN] </labels>{instances}"
        "</system_template>"
    )
    more = "<smotion mode='remd'><remd><stride> 2 </stride></remd></smotion>"
    with by_itself(write(tmp_path / "ipi", direct("stiff", STIFF), systems, more=more)) as other:
        mine = run(write(tmp_path / "our", direct("stiff"), systems, more=more), springs_pool)
        for k in range(3):
            assert_same(mine.folder, other(), f"rep{k}")
            recorded = dipoles(mine.folder / f"dipoles-stiff-rep{k}.h5")
            expected = trajectory(other(), f"rep{k}")[:, :, 0]
            assert recorded == pytest.approx(expected, rel=0, abs=PRINTED)
        exchanges = [next(folder.glob("*remd_idx")).read_text() for folder in (mine.folder, other())]
    assert exchanges[0] == exchanges[1]
    assert len({tuple(line.split()[1:]) for line in exchanges[0].splitlines()}) > 1  # it did exchange
    again = run(mine.folder / "RESTART", springs_pool, steps=STEPS + 5)
    assert [part.potential for part in again.parts] == ["stiff"] * 3
    assert again.steps_done(again.structures) == 5


# ---- who is sent what, and who answers


@pytest.mark.parametrize("mode", ["unix", pytest.param("shm-batched", marks=pytest.mark.slow)])
def test_an_activelist_sends_fewer_atoms(springs_pool, tmp_path, mode):
    """Of a mixed crystallite only the helium is sent; its springs are not nitrogen's."""
    forces = "<force forcefield='stiff'/><force forcefield='soft'/>"
    mixed = "5\n# CELL(abcABC): 20 20 20 90 90 90 positions{angstrom} cell{angstrom}\n" + "".join(
        f"{element} {k} {k + 0.5} {-k}\n" for k, element in enumerate(["N", "He", "N", "He", "He"])
    )
    active = "<activelist> [1, 3, 4] </activelist>"
    path = write(tmp_path / "our", over(mode)("stiff", inside=active) + direct("soft"), system(forces))
    (path.parent / "n.xyz").write_text(mixed)
    mine = run(path, springs_pool)
    assert [part.numbers.tolist() for part in mine.parts] == [[2, 2, 2], [7, 2, 7, 2, 2]]
    x = trajectory(mine.folder) * BOHR
    potential = np.loadtxt(mine.folder / "run.out")[:, 3]
    spring = SOFT * np.array([7, 2, 7, 2, 2]) / 7 + STIFF * np.array([0, 2, 0, 2, 2]) / 7
    expected = 0.5 * np.einsum("fbai,a->f", (x / BOHR) ** 2, spring) / BEADS
    assert potential == pytest.approx(expected, rel=1e-5)  # the positions are printed with 6 digits
    # The centroid of springs moves on its own, here by the leapfrog: x'' = -k x / m on every atom.
    centroid = x.mean(axis=1) / BOHR
    mass = np.array([atomic_masses[z] for z in (7, 2, 7, 2, 2)]) * AMU_IN_ELECTRON_MASSES
    step = 0.5 / ATOMIC_TIME
    change = centroid[2:] - 2 * centroid[1:-1] + centroid[:-2]
    forces = -(spring / mass)[:, None] * centroid[1:-1] * step**2
    assert change == pytest.approx(forces, abs=4 * PRINTED)
    assert np.abs(forces).max() > 100 * PRINTED


@pytest.mark.slow
def test_a_force_field_that_is_left_to_somebody_else(springs_pool, tmp_path):
    both = "<force forcefield='soft'/><force forcefield='theirs'/>"
    name = f"many-{os.getpid()}-theirs"
    fields = direct("soft") + f"<ffsocket name='theirs' mode='unix'><address>{name}</address></ffsocket>"
    drivers = []

    def start():
        drivers.extend(
            own_drivers(Path(sys.executable).with_name("i-pi-driver-py"), ["-u", "-a", name], spring=STIFF)
        )

    path = write(tmp_path / "our", fields, system(both))
    make_folder(tmp_path / "our/run", force=False)
    job = Run(path, tmp_path / "our/run", springs_pool.address, leave=["theirs"])
    try:
        until = time.monotonic() + 20
        while not Path(f"/tmp/ipi_{name}").exists() and time.monotonic() < until:
            time.sleep(0.02)
        start()
        job.wait(lambda: None, interval=0.05)
    finally:
        job.stop()
        for driver in drivers:
            driver.kill()
            driver.wait()
    fields = direct("soft", SOFT) + direct("theirs", STIFF)
    with by_itself(write(tmp_path / "ipi", fields, system(both))) as other:
        assert_same(job.folder, other())
    assert [part.field.name for part in job.parts] == ["soft"]


def test_one_door_that_fails_ends_the_run_softly_with_a_restart(tmp_path):
    """Two sockets, and the workers of their pool die: i-PI is asked once to stop, and writes RESTART."""
    forces = "<force forcefield='soft'/><force forcefield='stiff'/>"
    path = write(tmp_path / "our", over("unix")("soft") + over("unix")("stiff"), system(forces), steps=100000)
    make_folder(tmp_path / "our/run", force=False)
    with LocalPool(MODELS, tmp_path / "logs", workers=1, device="cpu") as own:
        own.wait_ready(timeout=60)
        job = Run(path, tmp_path / "our/run", own.address)
        killed = False

        def kill():
            nonlocal killed
            if not killed and own.status().force_sets > 10:
                os.kill(own.pids[0], signal.SIGKILL)
                killed = True

        with pytest.raises(ProgramError, match=r"All workers have ended.*RESTART was written"):
            job.wait(kill, interval=0.05)
    assert not list(Path("/tmp").glob(f"ipi_many-{os.getpid()}-*"))


# ---- nnqmd serve


@contextlib.contextmanager
def serving(folder, *arguments):
    """``nnqmd serve`` with both potentials; what it has said, when it has ended."""
    program = [sys.executable, "-c", "from nnqmd_server.cli import main; main()", "serve"]
    models = [f"{name}={model}" for name, model in MODELS.items()]
    address = ["--address", f"ipc://{folder}/pool/p", "--workers", "1", "--device", "cpu"]
    said = folder / "serve.log"
    with said.open("w") as output:
        served = subprocess.Popen(
            [*program, *models, *address, *arguments], cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )

    def words():
        assert served.wait(30) == 0, said.read_text()
        return said.read_text()

    try:
        yield words
    finally:
        served.kill()
        served.wait()


def test_several_sockets_of_several_simulations_at_one_pool(tmp_path):
    """One i-PI with two sockets, each with its potential; another one with two systems at one socket."""
    name = f"many-{os.getpid()}"
    field = "<ffsocket name='{0}' mode='unix'><address>" + name + "-{0}</address></ffsocket>"
    one = system("<force forcefield='soft'/><force forcefield='stiff' nbeads='2'/>")
    pair = system("<force forcefield='p'/>", "one") + system("<force forcefield='p'/>", "two")
    first = write(tmp_path / "first", field.format("soft") + field.format("stiff"), one)
    second = write(tmp_path / "second", field.format("p"), pair)
    own = direct("soft", SOFT) + direct("stiff", STIFF) + direct("p", STIFF)
    sockets = [word for key in ("soft", "stiff", "p") for word in ("--socket", f"{key}=unix:{name}-{key}")]
    options = ["--potential", "p=stiff", "--template", "first/n.xyz", "--template", "p=second/n.xyz"]
    options += ["--beads", "soft=4", "--beads", "stiff=2", "--dipoles", "stiff=stiff.h5"]
    with (
        serving(tmp_path, *sockets, *options) as words,
        by_itself(first) as mine,
        by_itself(second) as two,
        by_itself(write(tmp_path / "a", own, one)) as other,
        by_itself(write(tmp_path / "b", own, pair)) as others,
    ):
        assert_same(mine(), other())
        assert_same(two(), others(), "one")
        assert_same(two(), others(), "two")
        said = words()
    whole = (STEPS + 1) * (BEADS + 2 + 2 * BEADS)
    assert f"({whole} structures)" in said
    assert dipoles(tmp_path / "stiff.h5").shape == (STEPS + 1, 2, 3)


@pytest.mark.slow
def test_dipoles_of_systems_that_share_a_direct_door_are_not_mixed(tmp_path):
    """By hand, without the doubling that `nnqmd run` does: refused with the fix, unless not wanted."""
    pair = system("<force forcefield='p'/>", "nitrogen") + system(
        "<force forcefield='p'/>", "helium", "he.xyz"
    )
    told = "template: n.xyz he.xyz, potential: stiff"
    pool = f"ipc://{tmp_path}/pool/p"
    each = pair.replace("'p'", "'n'", 1).replace("'p'", "'he'", 1)
    own = direct("n", STIFF) + direct("he", 2 / 7 * STIFF)
    refused = write(tmp_path / "refused", direct("p", more=told), pair)
    served = write(tmp_path / "served", direct("p", more=told + ", dipoles: none"), pair)
    with (
        serving(tmp_path),
        by_itself(served, pool) as mine,
        by_itself(write(tmp_path / "ipi", own, each)) as other,
    ):
        ipi = start_ipi(refused, pool=pool)
        ipi.wait(30)
        log = (refused.parent / "i-pi.log").read_text()
        assert "their dipoles would be mixed" in log
        assert "Traceback" not in log
        assert_same(mine(), other(), "nitrogen")
        assert_same(mine(), other(), "helium", 3)


SERVE_ERRORS = [
    (["unix:a", "unix:b"], [], ["t.xyz"], "need a name each", "--socket full=unix:first"),
    (["x=unix:a"], [], ["t.xyz"], "Which potential answers unix:a: soft, stiff", "--socket soft=unix:a"),
    (["soft=unix:a"], ["none"], ["t.xyz"], "Which potential answers unix:a", "--potential soft"),
    (["soft=unix:a", "stiff=unix:b"], [], ["soft=t.xyz"], "unix:b needs the elements", "stiff=init.xyz"),
    (
        ["soft=unix:a", "stiff=unix:b"],
        [],
        ["t.xyz", "sift=t.xyz"],
        "names sift, which is no socket",
        "soft=t.xyz",
    ),
]


@pytest.mark.parametrize(("sockets", "chosen", "templates", "what", "fix"), SERVE_ERRORS)
def test_sockets_that_are_not_clear_are_refused(sockets, chosen, templates, what, fix):
    with pytest.raises(InputError, match=what) as caught:
        read_sockets(sockets, ["soft", "stiff"], chosen, templates, [], [])
    assert fix in caught.value.fix


def test_extras_are_given_by_those_that_have_them():
    with_dipole, without = {"name": "a", "properties": ["dipole"]}, {"name": "b", "properties": []}
    assert share_extras(["dipole"], [with_dipole, without]) == [["dipole"], []]
    assert share_extras([], [with_dipole, without]) == [[], []]
    for cards in ([without], [without, without]):
        with pytest.raises(InputError, match="dipole"):
            share_extras(["dipole"], cards)
    with pytest.raises(InputError, match="no extras dipol"):
        share_extras(["dipol"], [with_dipole, without])


def test_two_records_in_one_file_are_refused():
    with pytest.raises(InputError, match="into one file"):
        read_sockets(["soft=unix:a", "stiff=unix:b"], list(MODELS), [], ["t.xyz"], ["4"], ["d.h5"])


# ---- ffmpi


needs_mpi = pytest.mark.skipif(
    find_mpiexec() is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpi4py and mpiexec: pip install 'nnqmd-server[mpi]'",
)


def ffmpi(name, beads=BEADS):
    return f"<ffmpi name='{name}'><batch_size>{beads}</batch_size></ffmpi>"


@needs_mpi
@pytest.mark.peer
def test_several_ffmpi_and_systems_in_an_mpiexec_that_we_start(tmp_path):
    """Contraction in one system, and another system that shares one of the force fields."""
    forces = "<force forcefield='soft'/><force forcefield='stiff' nbeads='2'/>"
    pair = system(forces, "one") + system("<force forcefield='stiff'/>", "two")
    with by_itself(write(tmp_path / "ipi", direct("soft", SOFT) + direct("stiff", STIFF), pair)) as other:
        path = write(tmp_path / "our", ffmpi("soft") + ffmpi("stiff"), pair)
        make_folder(tmp_path / "run", force=False)
        job = MpiRun(path, tmp_path / "run", MODELS, options=RankOptions(workers=1, device="cpu"))
        try:
            job.wait(lambda: None, interval=0.05)
        finally:
            job.stop()
        for prefix in ("one", "two"):
            assert_same(job.folder, other(), prefix)
        expected = trajectory(other(), "two")[:, :, 0]
    assert job.steps_printed() == STEPS
    assert dipoles(job.folder / "dipoles-stiff-two.h5") == pytest.approx(expected, rel=0, abs=PRINTED)
    assert dipoles(job.folder / "dipoles-stiff-one.h5").shape == (STEPS + 1, 2, 3)
    # One pool for all ranks of this node.
    counts = re.findall(r"rank \d: \d+ force sets \((\d+) structures\)", job.log.read_text())
    assert counts == [str((STEPS + 1) * (BEADS + 2 + BEADS))]


def test_without_mpi_the_command_line_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("nnqmd_server.inputs.mpi_run.find_mpiexec", lambda: None)
    forces = "<force forcefield='soft'/><force forcefield='stiff' nbeads='2'/>"
    path = write(tmp_path / "our", ffmpi("soft") + ffmpi("stiff", 2), system(forces))
    make_folder(tmp_path / "run", force=False)
    with pytest.raises(ProgramError, match="needs mpiexec") as caught:
        MpiRun(path, tmp_path / "run", MODELS)
    fix = caught.value.fix
    assert f"cd {tmp_path / 'run'} && mpiexec -n 1 i-pi input.xml : -n 1 nnqmd serve" in fix
    for name, beads in (("soft", BEADS), ("stiff", 2)):
        assert f"--potential {name} --name {name} --template template-{name}.xyz --beads {beads}" in fix
    assert read_numbers(tmp_path / "run/template-soft.xyz").tolist() == [7] * 5


def test_ffmpi_beside_other_doors_of_ours_is_refused(tmp_path):
    forces = "<force forcefield='soft'/><force forcefield='stiff'/>"
    path = write(tmp_path / "our", ffmpi("soft") + direct("stiff"), system(forces))
    with pytest.raises(InputError, match="beside other force fields"):
        is_over_mpi(check(path, MODELS)[1])


# ---- what is refused, before anything is started


def plain(name):
    return direct(name)


@pytest.mark.parametrize(
    ("fields", "systems", "models", "leave", "what", "fix"),
    [
        (
            ["a", "b"],
            [system("<force forcefield='a'/><force forcefield='b'/>")],
            MODELS,
            [],
            "Which potential is the force field a",
            "--model a=MODEL",
        ),
        (
            ["soft"],
            [system("<force forcefield='soft'/>")],
            MODELS,
            [],
            "No force field .* asks for the potential stiff",
            "--model soft=MODEL",
        ),
        (
            ["soft"],
            [system("<force forcefield='soft'/>")] * 2,
            MODELS,
            [],
            "write into the same files",
            "prefix",
        ),
        (
            ["soft"],
            [system("<force forcefield='soft' nbeads='2'/>")],
            MODELS,
            [],
            "<batch_size> of soft is 4",
            "<batch_size>2<",
        ),
        (
            ["soft"],
            [system("<force forcefield='soft'/>")],
            MODELS,
            ["sott"],
            "no force field sott",
            "It has soft",
        ),
        (
            ["soft"],
            [system("<force forcefield='other'/>")],
            MODELS,
            [],
            "no force field that nnqmd can answer",
            "name it in <forces>",
        ),
        (
            ["soft"],
            [system("<force forcefield='soft'/>", init="he.xyz")],
            {"soft": MODELS["soft"]},
            [],
            "template n.xyz has 5 atoms, the system has 3",
            "initialises",
        ),
    ],
)
def test_what_is_not_clear_is_refused_with_the_fix(tmp_path, fields, systems, models, leave, what, fix):
    path = write(tmp_path / "in", "".join(direct(name) for name in fields), "".join(systems))
    with pytest.raises(InputError, match=what) as caught:
        check(path, models, leave=leave)
    assert fix in caught.value.fix


def test_a_committee_that_two_systems_share_is_refused(tmp_path):
    pair = system("<force forcefield='c'/>", "one") + system("<force forcefield='c'/>", "two")
    path = write(
        tmp_path / "in", f"<ffcommittee name='c'>{direct('soft')}{direct('stiff')}</ffcommittee>", pair
    )
    with pytest.raises(InputError, match="could not tell them apart"):
        check(path, MODELS)
