"""The MPI door: its messages against i-PI's own code, and real i-PI runs under mpiexec."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import test_extras
import test_runs
import test_sockets
from ase import Atoms
from ase.io import read
from conftest import MODEL, ROOT
from ipi.interfaces.mpi import InterfaceMPI
from springs import NUMBERS, POSITIONS, positions, start_ipi, write_input
from test_runs import EVERY_STEP, STEPS, numbers, variant

from nnqmd_server.doors.mpi import Tag, read_work, write_results
from nnqmd_server.doors.mpi_job import Place, Rank, arrange
from nnqmd_server.doors.mpi_nodes import from_bytes, to_bytes
from nnqmd_server.errors import ProgramError
from nnqmd_server.inputs.run import find_ipi
from nnqmd_server.inputs.xml import read_input
from nnqmd_server.pool.messages import BadMessageError, Message

BEADS = 8
direct = test_runs.direct  # the fixture: the run to compare with


# ---- without MPI: what goes over the wire, and who does what


class Wire:
    """Stands for MPI's communicator: keeps what i-PI sends."""

    INT = DOUBLE = BYTE = None

    def __init__(self):
        self.sent = []

    def Send(self, buffer, dest, tag):
        self.sent.append((tag, buffer[0]))


class Request(dict):
    """As i-PI's ForceRequest, as far as its MPI interface needs it."""

    def __init__(self, **fields):
        super().__init__(fields)
        self._event_done = threading.Event()


def test_the_messages_are_those_that_ipi_writes_and_reads():
    rng = np.random.default_rng(1)
    h, q = rng.normal(size=(3, 3, 3)), rng.normal(size=(3, 5, 3))
    requests = [
        Request(cell=(h[k], np.linalg.inv(h[k])), pos=q[k].ravel(), status="Queued") for k in range(3)
    ]
    ipi = InterfaceMPI("a", batch_size=4)
    ipi.comm, ipi.requests = Wire(), requests
    ipi._ranks = {1: {"rank": 1, "state": "IDLE", "requests": [], "nat": None}}
    ipi._dispatch(Wire)
    (first, header), (second, body) = ipi.comm.sent
    assert first == second == Tag.WORK
    cells, positions = read_work(header, body)
    assert (cells == h).all()
    assert (positions == q).all()

    answers = [
        (float(k), q[k] + 1, h[k] - 1, text) for k, text in enumerate(["", '{"dipole": [1, 2, 3]}', ""])
    ]
    results, extras = write_results(answers)
    ipi._unpack_results(requests, 5, results, extras)
    for request, (energy, forces, virial, _) in zip(requests, answers, strict=True):
        found = request["result"]
        assert found[0] == energy
        assert (found[1] == forces.ravel()).all()
        assert (found[2] == virial).all()
    assert requests[1]["result"][3]["dipole"] == [1, 2, 3]


@pytest.mark.parametrize(("header", "length"), [([5, 1], 32), ([0, 1], 18), ([5, -1], 33), ([5], 33)])
def test_work_that_is_not_as_long_as_it_says_is_refused(header, length):
    with pytest.raises(ProgramError, match="i-PI sent"):
        read_work(np.array(header, np.int32), np.zeros(length))


def test_ranks_of_a_force_field_are_one_group_with_one_pool_on_each_node():
    ranks = [Rank(n, node, "a", 0, "m") for n, node in [(1, "x"), (2, "x"), (3, "y")]]
    whole = (1, 2, 3)
    assert arrange(ranks, 1) == Place(whole, carriers=(1, 3), host=1, groups=1)
    assert arrange(ranks, 2) == Place(whole, carriers=(1, 3), host=1, groups=1)
    assert arrange(ranks, 3) == Place(whole, carriers=(1, 3), host=3, groups=1)


def test_groups_and_force_fields_on_a_node_share_a_pool_of_the_same_model():
    ranks = [
        Rank(1, "x", "a", 1, "m"),
        Rank(2, "x", "a", 1, "m"),
        Rank(3, "x", "b", 0, "m"),
        Rank(4, "x", "c", 0, "n"),
    ]
    assert arrange(ranks, 2) == Place((2,), carriers=(2,), host=1, groups=2)
    assert arrange(ranks, 3) == Place((3,), carriers=(3,), host=1, groups=1)
    assert arrange(ranks, 4) == Place((4,), carriers=(4,), host=4, groups=1)


def test_messages_between_nodes_survive_the_way():
    message = Message("done", {"seconds": 1.5}, {"energy": np.arange(3.0), "none": np.empty((0, 3))})
    found = from_bytes(to_bytes(message))
    assert (found.kind, found.fields) == ("done", {"seconds": 1.5})
    assert (found.arrays["energy"] == np.arange(3.0)).all()
    assert found.arrays["none"].shape == (0, 3)
    for broken in (np.empty(0, np.uint8), to_bytes(message)[:20], np.full(64, 255, np.uint8)):
        with pytest.raises(BadMessageError):
            from_bytes(broken)


# ---- real runs

MPIEXEC = next(
    filter(None, [shutil.which("mpiexec", path=Path(sys.executable).parent), shutil.which("mpiexec")]), None
)
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpi4py and mpiexec: pip install 'nnqmd-server[mpi]'",
)


def ffmpi(*names, beads=BEADS):
    """Changes of the shipped input: one or more <ffmpi>, each with the same share of the force."""
    blocks = "".join(f"<ffmpi name='{name}'><batch_size>{beads}</batch_size></ffmpi>" for name in names)
    forces = "".join(f"<force forcefield='{name}' weight='{1 / len(names)}'/>" for name in names)
    return EVERY_STEP | {r"<ffdirect.*?</ffdirect>": blocks, r"<force forcefield.*?/>": forces}


def serve(count=1, *options, node="here", model=str(MODEL), before=""):
    """A section of the mpiexec line with driver ranks."""
    program = [sys.executable, "-c", f"{before}from nnqmd_server.cli import main; main()"]
    chosen = ["serve", model, "--door", "mpi", "--template", "init.xyz"]
    chosen += [] if "--beads" in options else ["--beads", str(BEADS)]
    places = [f"NNQMD_NODE={node}", f"PYTHONPATH={ROOT}:{Path(__file__).parent}"]
    rank = ["env", *places, *program, *chosen, "--workers", "1", "--device", "cpu", *options]
    return [":", "-n", str(count), *rank]


def is_open_mpi():
    return "Open MPI" in subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True).stdout


def mpiexec():
    """The beginning of an mpiexec line."""
    if is_open_mpi():
        root = ["--allow-run-as-root"] if os.getuid() == 0 else []
        return [MPIEXEC, "--oversubscribe", "--bind-to", "none", *root]
    return [MPIEXEC]


def start(source, *drivers, ipi=()):
    command = mpiexec()
    command += ["-n", "1", sys.executable, *ipi, find_ipi(), source.name]
    with (source.parent / "log").open("w") as log:
        return subprocess.Popen(
            [*command, *(word for driver in drivers for word in driver)],
            cwd=source.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def finish(process, folder, seconds=120):
    """Exit status and log of an MPI job; one that does not end is a failure."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(2)
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"mpiexec did not end:\n{(folder / 'log').read_text()[-3000:]}")
    return status, (folder / "log").read_text()


def simulate(tmp_path, changes, *drivers, steps=STEPS):
    source = variant(tmp_path, "in", changes | {r"<total_steps>\d+": f"<total_steps>{steps}"})
    status, log = finish(start(source, *drivers), source.parent)
    assert status == 0, log[-3000:]
    return source.parent, log


def structures(log):
    """How many structures each pool has evaluated."""
    return [int(count) for count in re.findall(r"force sets \((\d+) structures\)", log)]


def assert_same_trajectory(folder, direct):
    for what, tolerance in (("xc", 1e-5), ("vc", 1e-6)):
        mine, other = (numbers(f / f"nh3.{what}.xyz") for f in (folder, direct.folder))
        assert len(mine) == 64 * (STEPS + 1 if what == "xc" else STEPS // 2 + 1)
        assert mine == pytest.approx(other, abs=tolerance)
    conserved = [np.loadtxt(f / "nh3.out")[:, 2] for f in (folder, direct.folder)]
    assert conserved[0] == pytest.approx(conserved[1], abs=1e-4)


def assert_same_dipoles(folder, direct):
    with h5py.File(folder / "dipoles.h5") as mine, h5py.File(direct.folder / "dipoles.h5") as other:
        assert mine["dipole"].shape == (STEPS + 1, BEADS, 3)
        # Beads stand in the same order in both.
        assert mine["dipole"][:] == pytest.approx(other["dipole"][:], abs=1e-5)
        assert mine["energy"][:] == pytest.approx(other["energy"][:], abs=1e-5)


@needs_mpi
@pytest.mark.peer
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_trajectory_through_the_direct_and_the_mpi_door(direct, tmp_path, ranks):
    extras = "<trajectory filename='dip' stride='1' extra_type='dipole'> extras </trajectory><checkpoint"
    changes = ffmpi("allegro") | {r"<checkpoint": extras}
    folder, log = simulate(tmp_path, changes, serve(ranks, "--dipoles", "dipoles.h5", "--extras", "dipole"))
    assert_same_trajectory(folder, direct)
    assert_same_dipoles(folder, direct)
    assert structures(log) == [BEADS * (STEPS + 1)]  # no bead was computed twice
    assert (folder / "nh3.dip_7").exists()
    assert not list(folder.glob("nnqmd-logs/rank-2"))  # the ranks of a node share a pool


# ---- with springs instead of the model

SPRINGS = f"{Path(__file__).parent}/spring_potential.py:springs"


def spring_input(folder, beads=BEADS, **options):
    block = f"<ffmpi name='springs'><batch_size>{beads}</batch_size></ffmpi>"
    return write_input(folder, block, beads, **options)


@needs_mpi
@pytest.mark.peer
def test_fifty_steps_are_the_same_to_round_off_and_ipi_reads_the_extras(tmp_path):
    harmonic = write_input(tmp_path / "own", test_sockets.HARMONIC, test_extras.BEADS, 50, precise=True)
    assert start_ipi(harmonic).wait(60) == 0
    files = test_extras.FILES
    source = spring_input(tmp_path, test_extras.BEADS, steps=50, output=files, precise=True)
    options = ["--beads", str(test_extras.BEADS), "--extras", test_extras.WANTED]
    status, log = finish(start(source, serve(1, *options, model=SPRINGS)), tmp_path)
    assert status == 0, log[-3000:]
    test_sockets.assert_same_to_round_off(tmp_path, tmp_path / "own")
    test_extras.assert_extras(tmp_path, steps=50)
    assert structures(log) == [test_extras.BEADS * 51]


@needs_mpi
@pytest.mark.peer
@pytest.mark.parametrize("told", [True, False])
def test_the_quarantine_tells_the_bead_where_it_is_known(tmp_path, told):
    beads, bead, step = 3, 2, 6
    own = write_input(tmp_path / "own", test_sockets.HARMONIC, beads, step + 1, POSITIONS)
    assert start_ipi(own).wait(60) == 0
    source = spring_input(tmp_path, beads, steps=1000, safe_stride=1)
    np.save(tmp_path / "marked.npy", positions(tmp_path / "own", beads)[step, bead])
    section = serve(1, "--beads", str(beads), model=SPRINGS.replace(":springs", ":marked"))
    if not told:
        at = section.index("--beads")
        del section[at : at + 2]
        # Any structure file will do, though ASE reads most of them together with all ranks of a job.
        Atoms(NUMBERS).write(tmp_path / "init.extxyz")
        section[section.index("init.xyz")] = "init.extxyz"
    status, log = finish(start(source, section), tmp_path, seconds=60)
    assert status != 0
    assert "nnqmd: RESTART was written" in log
    assert (f"bead {bead} of force set {step}" in log) == told
    (frame,) = read(tmp_path / "quarantine.extxyz", ":")
    assert "charge that is not finite" in frame.info["reason"]
    assert (frame.info.get("bead"), frame.info.get("force_set")) == ((bead, step) if told else (None, None))


BROKEN = """
import runpy, sys
from ipi.engine.simulation import Simulation
step = Simulation.run_step
def broken(self, number):
    if number == 20:
        raise RuntimeError("a bug of i-PI")
    step(self, number)
Simulation.run_step = broken
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@needs_mpi
@pytest.mark.peer
@pytest.mark.parametrize("here", [True, False])
def test_an_ipi_that_fails_ends_the_job(tmp_path, here):
    """It waits for all of us in MPI_Finalize: seen on its node, noticed by its silence from another."""
    source = spring_input(tmp_path, steps=1000)
    (tmp_path / "broken.py").write_text(BROKEN)
    hide = "" if here else "import nnqmd_server.doors.mpi as m; m.rank_zero = lambda number: None;"
    began = time.monotonic()
    section = serve(1, *([] if here else ["--silence", "5"]), model=SPRINGS, before=hide)
    status, log = finish(start(source, section, ipi=["broken.py"]), tmp_path, seconds=40)
    assert status != 0
    assert time.monotonic() - began < 25
    assert "a bug of i-PI" in log
    words = "i-PI has ended with an error" if here else "i-PI has asked for nothing for 5 s"
    assert words in log
    assert_workers_end(tmp_path)


@needs_mpi
@pytest.mark.peer
def test_ipi_may_ask_for_less_than_a_force_set_at_once(direct, tmp_path):
    folder, log = simulate(tmp_path, ffmpi("allegro", beads=3), serve(1, "--dipoles", "dipoles.h5"))
    assert_same_trajectory(folder, direct)
    assert_same_dipoles(folder, direct)
    assert structures(log) == [BEADS * (STEPS + 1)]


@needs_mpi
@pytest.mark.peer
def test_several_groups_answer_one_force_field(direct, tmp_path):
    folder, log = simulate(tmp_path, ffmpi("allegro", beads=4), serve(2, "--group", "1"))
    assert_same_trajectory(folder, direct)
    assert structures(log) == [BEADS * (STEPS + 1)]
    assert re.search(r"driver roots \[1, 2\]", log)


@needs_mpi
@pytest.mark.peer
def test_two_force_fields_by_name_share_the_pool_of_their_node(direct, tmp_path):
    drivers = [serve(1, "--name", name, "--dipoles", f"{name}.h5") for name in ("one", "two")]
    folder, log = simulate(tmp_path, ffmpi("one", "two"), *drivers)
    assert_same_trajectory(folder, direct)
    assert structures(log) == [2 * BEADS * (STEPS + 1)]
    for name in ("one", "two"):
        (folder / f"{name}.h5").rename(folder / "dipoles.h5")
        assert_same_dipoles(folder, direct)


@needs_mpi
@pytest.mark.peer
def test_the_ranks_of_two_nodes_share_a_force_set(direct, tmp_path):
    drivers = [serve(1, "--dipoles", "dipoles.h5", node=node) for node in ("x", "y")]
    folder, log = simulate(tmp_path, ffmpi("allegro"), *drivers)
    assert_same_trajectory(folder, direct)
    assert_same_dipoles(folder, direct)
    each = structures(log)
    assert len(each) == 2
    assert sum(each) == BEADS * (STEPS + 1)
    assert min(each) > BEADS  # both took part


def assert_workers_end(folder):
    """A worker whose pool was killed looks once a second whether it is still there."""
    until = time.monotonic() + 20
    while workers_of(folder) and time.monotonic() < until:
        time.sleep(0.2)
    assert workers_of(folder) == []


def workers_of(folder):
    """Process numbers of the workers of the pool that was started in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                process.joinpath("cwd").readlink() == folder
                and b"pool.worker" in (process / "cmdline").read_bytes()
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def running(tmp_path, *drivers):
    """A long run that has got past its first steps."""
    changes = ffmpi("allegro") | {"safe_stride='100'": "safe_stride='1'"}
    source = variant(tmp_path, "in", changes)
    process = start(source, *drivers)
    out, until = source.parent / "nh3.out", time.monotonic() + 90
    while not (out.exists() and len(out.read_text().splitlines()) > 12) and time.monotonic() < until:
        time.sleep(0.1)
    return process, source.parent


@needs_mpi
@pytest.mark.peer
@pytest.mark.parametrize("nodes", [1, 2])
def test_workers_that_die_end_the_job_with_a_restart(tmp_path, nodes):
    process, folder = running(tmp_path, *(serve(1, "--dipoles", "d.h5", node=str(k)) for k in range(nodes)))
    os.kill(max(workers_of(folder)), signal.SIGKILL)
    status, log = finish(process, folder, seconds=40)
    assert status != 0
    assert re.search("nnqmd: .*All workers have ended", log)
    assert "nnqmd: RESTART was written" in log
    assert read_input(folder / "RESTART").first_step > 1
    assert not (folder / "EXIT").exists()
    with h5py.File(folder / "d.h5") as file:
        assert file["dipole"].shape[0] > 1
    assert_workers_end(folder)


@needs_mpi
@pytest.mark.peer
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_mpiexec_stops_the_run_softly(tmp_path, number):
    if number == signal.SIGINT and is_open_mpi():
        pytest.skip("the mpiexec of Open MPI kills its processes on Ctrl-C; `touch EXIT` stops i-PI softly")
    process, folder = running(tmp_path, serve(1))
    process.send_signal(number)
    finish(process, folder, seconds=40)
    assert read_input(folder / "RESTART").first_step > 1
    assert_workers_end(folder)


@needs_mpi
@pytest.mark.peer
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--template", "none.xyz"], "no template structure"),
        (["--address", "tcp://0.0.0.0:5555"], "can be reached from other machines"),
        (["--beads", "0"], "--beads is '0'"),
        (["--door", "mpj"], "no door 'mpj'"),
        (["--group", "1", "--dipoles", "d.h5"], "the dipoles cannot be kept in order"),
    ],
)
def test_what_cannot_begin_ends_the_job_with_its_message(tmp_path, options, words):
    source = variant(tmp_path, "in", ffmpi("allegro"))
    status, log = finish(start(source, serve(2, *options)), source.parent, seconds=60)
    assert status != 0
    assert words in log


@needs_mpi
@pytest.mark.peer
def test_an_ipi_that_never_joins_is_not_waited_for_for_ever(tmp_path):
    """i-PI ends before MPI_Init when its input is wrong; without a limit our rank would stay in it."""
    late = "import nnqmd_server.doors.mpi_job as j; j.JOIN_TIMEOUT = 2.0; j.Job('', 0, '')"
    command = [*mpiexec(), "-n", "1", "false", ":", "-n", "1", sys.executable, "-c", late]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    # Open MPI's mpiexec notices by itself that a process has ended too early.
    assert "i-PI has not joined the MPI job" in done.stderr or is_open_mpi()


@needs_mpi
@pytest.mark.peer
def test_an_answer_that_ipi_will_never_take_does_not_hold_the_job_up():
    """i-PI that stops softly says EXIT and takes no more results, however large they are."""
    ipi = "from mpi4py import MPI; w = MPI.COMM_WORLD; w.Split(0, 0); w.Send(bytearray(4), dest=1, tag=6)"
    ours = (
        "import numpy as np; from nnqmd_server.doors.mpi_job import Job; job = Job('', 0, '');"
        "print('taken:', job.send(np.zeros(10**7), 0, 4, lambda: job.heard(0, 6) is not None))"
    )
    command = [*mpiexec(), "-n", "1", sys.executable, "-c", ipi, ":", "-n", "1", sys.executable, "-c", ours]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "taken: False" in done.stdout


@needs_mpi
@pytest.mark.peer
def test_outside_of_mpiexec_the_door_says_how_to_start_it(tmp_path):
    command = serve(1, "--template", "x.xyz")[3:]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert "mpiexec -n 1 i-pi" in done.stderr.replace("\n", " ")
