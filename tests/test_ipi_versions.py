"""Every i-PI that we say we serve, each in an environment of its own, against its own Python driver."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
from filelock import FileLock
from springs import POSITIONS, Springs, answer, own_drivers, positions, start_ipi, wait_for, write_input

from nnqmd_server.doors.address import ipi_address
from nnqmd_server.units import BOHR

pytestmark = [pytest.mark.slow, pytest.mark.peer]

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nnqmd" / "ipi"
BEADS = 6
STEPS = 30
SETS = STEPS + 1


@pytest.fixture(scope="module", params=["2.6.3", "3.0", "3.1.12", "3.3.1"])
def programs(request):
    """The folder with ``i-pi`` and its driver, of one version; made by pip once and kept."""
    home = CACHE / request.param
    numpy = "numpy<2" if request.param < "3.1" else "numpy"  # their own drivers hang with numpy 2.4
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{request.param}.lock"):
        if not (home / "complete").exists():
            made = subprocess.run([sys.executable, "-m", "venv", home], capture_output=True, text=True)
            if made.returncode == 0:
                pip = [home / "bin/pip", "install", "--quiet", "--disable-pip-version-check"]
                made = subprocess.run(
                    [*pip, f"ipi=={request.param}", "scipy", numpy], capture_output=True, text=True
                )
            if made.returncode != 0:
                pytest.skip(f"pip cannot install i-PI {request.param}: {made.stderr.strip()[-200:]}")
            (home / "complete").touch()
    return home / "bin"


@pytest.mark.parametrize("mode", ["unix", "inet"])
def test_the_same_trajectory_as_with_its_own_driver(programs, tmp_path, mode):
    name, port = f"nnqmd-peer-{os.getpid()}", 23000 + os.getpid() % 20000
    if mode == "unix":
        address, named, where = ipi_address(mode, name), f"<address>{name}</address>", ["-u", "-a", name]
    else:
        address = ipi_address(mode, "localhost", port)
        named = f"<address>localhost</address><port>{port}</port>"
        where = ["-a", "localhost", "-p", str(port)]
    force_field = f"<ffsocket name='springs' mode='{mode}'>{named}</ffsocket>"

    ipi = start_ipi(write_input(tmp_path / "own", force_field, BEADS, STEPS, POSITIONS), programs / "i-pi")
    if mode == "unix":
        wait_for(Path(address.path), ipi)
    else:
        wait_for_line(tmp_path / "own/i-pi.log", "Starting the polling thread")
    drivers = own_drivers(programs / "i-pi-driver-py", where)
    try:
        assert ipi.wait(60) == 0
    finally:
        ipi.kill()
        for driver in drivers:
            driver.kill()
            driver.wait()

    ipi = start_ipi(write_input(tmp_path / "ours", force_field, BEADS, STEPS, POSITIONS), programs / "i-pi")
    client, record = Springs(), tmp_path / "d.h5"
    answer(address, ipi, client, BEADS, 1, record)
    expected, got = (positions(tmp_path / folder, BEADS) for folder in ("own", "ours"))
    assert expected.shape == (SETS, BEADS, 64, 3)
    assert got == pytest.approx(expected, rel=1e-10, abs=1e-10)
    with h5py.File(record) as file:
        assert file["dipole"][:] / BOHR == pytest.approx(expected[:, :, 0], abs=2e-5)
    assert sum(client.calls) == BEADS * SETS
    # i-PI 2.6.3 asks for the next bead when the last has been answered: nothing can be gathered there.
    alone = programs.parent.name == "2.6.3"
    assert len(client.calls) <= (BEADS if alone else 2) * SETS


def wait_for_line(log, text):
    until = time.monotonic() + 20
    while text not in log.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
