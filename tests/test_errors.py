"""Every error that a user can cause: what is wrong, the fix, exit status 1, and no traceback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import INPUT, MODEL

from nnqmd_server.errors import AddressError, OutputError
from nnqmd_server.inputs.run import check, make_folder
from nnqmd_server.pool.folders import private_folder
from nnqmd_server.pool.launch import LocalPool


def nnqmd(*words, cwd, **environment):
    command = [sys.executable, "-c", "from nnqmd_server.cli import main; main()", *map(str, words)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def assert_error(done, *parts):
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("Error: ")
    assert "\nFix:" in done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.fixture
def source(tmp_path):
    """The shipped input in a folder of its own."""
    home = tmp_path / "in"
    home.mkdir()
    for name in ("input.xml", "init.xyz", "nnqmd_pes.py"):
        shutil.copy(INPUT.parent / name, home)
    return home / "input.xml"


def edit(source, old, new):
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))


def test_a_missing_model(source, tmp_path):
    done = nnqmd("run", source, "--model", "none.nequip.zip", "--out", "o", cwd=tmp_path)
    assert_error(done, "There is no model file none.nequip.zip", "nnqmd train")


@pytest.mark.parametrize("kind", ["text", "zip", "empty", "folder"])
def test_a_file_that_is_not_a_model(tmp_path, kind):
    path = tmp_path / "m.nequip.zip"
    if kind == "text":
        path.write_text("not a model")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "not a model")
    elif kind == "empty":
        path.touch()
    else:
        path.mkdir()
    assert_error(nnqmd("model", "info", path, cwd=tmp_path), "m.nequip.zip")
    assert_error(nnqmd("serve", path, cwd=tmp_path), "m.nequip.zip")


def test_an_element_that_the_model_does_not_know(source, tmp_path):
    structure = source.parent / "init.xyz"
    structure.write_text(structure.read_text().replace("N ", "O "))
    done = nnqmd("run", source, "--model", MODEL, "--out", "o", "--eager", "--workers", "1", cwd=tmp_path)
    assert_error(done, "does not know O", "it knows N, H")


def test_an_input_that_is_missing_or_not_one(tmp_path):
    assert_error(nnqmd("run", "none.xml", "--model", MODEL, cwd=tmp_path), "There is no input file none.xml")
    wrong = tmp_path / "wrong.xml"
    wrong.write_text("<simulation><output></simulation>")
    assert_error(nnqmd("run", wrong, "--model", MODEL, cwd=tmp_path), "cannot be read as XML")
    wrong.write_text("<html></html>")
    assert_error(nnqmd("run", wrong, "--model", MODEL, cwd=tmp_path), "is not an i-PI input")


def test_an_input_without_a_usable_force_field(source, tmp_path):
    edit(source, "<pes>custom</pes>", "<pes>harmonic</pes>")
    assert_error(
        nnqmd("run", source, "--model", MODEL, cwd=tmp_path),
        "no force field that nnqmd can answer",
        "<ffsocket>",
    )


def test_a_pes_that_does_not_exist(source, tmp_path):
    edit(source, "nnqmd_pes.py", "none.py")
    assert_error(nnqmd("run", source, "--model", MODEL, cwd=tmp_path), "names the PES none.py", "<pes_path>")


def test_a_batch_size_that_is_not_the_number_of_beads(source, tmp_path):
    edit(source, "<batch_size>8", "<batch_size>4")
    assert_error(
        nnqmd("run", source, "--model", MODEL, cwd=tmp_path),
        "<batch_size> of allegro is 4",
        "<batch_size>8</batch_size>",
    )


@pytest.mark.parametrize(
    "old", ["<timestep units='femtosecond'>0.5</timestep>", "<temperature units='kelvin'>100</temperature>"]
)
def test_an_input_without_timestep_or_temperature(source, tmp_path, old):
    edit(source, old, "")
    assert_error(nnqmd("run", source, "--model", MODEL, cwd=tmp_path), "has no")


def test_ipi_is_not_installed(source, tmp_path, monkeypatch):
    from nnqmd_server.errors import ProgramError
    from nnqmd_server.inputs import run

    monkeypatch.setattr(run.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramError, match="i-PI was not found") as caught:
        run.find_ipi()
    assert "pip install" in caught.value.fix


def test_an_error_of_ipi_itself_is_passed_on(source, tmp_path):
    edit(source, "<pile_lambda>0.5</pile_lambda>", "<pile_lambda>half</pile_lambda>")
    done = nnqmd("run", source, "--model", MODEL, "--out", "o", "--eager", "--workers", "1", cwd=tmp_path)
    assert_error(done, "i-PI ended early", "i-pi.log")


def test_an_address_in_use(tmp_path):
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    done = nnqmd("serve", MODEL, "--address", f"tcp://127.0.0.1:{port}", cwd=tmp_path)
    assert_error(done, f"Cannot listen at tcp://127.0.0.1:{port}", "port")
    taken.close()
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    live = socket.socket(socket.AF_UNIX)
    live.bind(str(folder / "pool"))
    live.listen(1)
    assert_error(
        nnqmd("serve", MODEL, "--address", f"ipc://{folder}/pool", cwd=tmp_path), "Another pool is listening"
    )
    live.close()


def test_an_ipi_socket_that_is_taken_or_left_behind(source, tmp_path):
    import re

    name = f"nnqmd-left-{os.getpid()}"
    text = re.sub(
        r"<ffdirect.*?</ffdirect>",
        f"<ffsocket name='allegro' mode='unix'><address>{name}</address></ffsocket>",
        source.read_text(),
        flags=re.DOTALL,
    )
    source.write_text(text)
    path = Path(f"/tmp/ipi_{name}")
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.listen(1)
    words = ("run", source, "--model", MODEL, "--eager", "--workers", "1")
    try:
        assert_error(nnqmd(*words, "--out", "a", cwd=tmp_path), f"Another i-PI listens at {path}")
        left.close()
        assert_error(
            nnqmd(*words, "--out", "b", cwd=tmp_path), "was left behind", f"rm {path}", "--remove-stale"
        )
        check(source, {"ammonia": str(MODEL)}, remove_stale=True)
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("door", [("--door", "mpi"), ("--socket", "unix:none")])
def test_a_record_of_dipoles_without_the_number_of_beads(tmp_path, door):
    words = ("serve", MODEL, *door, "--template", INPUT.parent / "init.xyz", "--dipoles", "d.h5")
    assert_error(nnqmd(*words, cwd=tmp_path), "needs the number of beads", "--beads")


def test_an_output_folder_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").touch()
    done = nnqmd("run", source, "--model", MODEL, "--out", "file/run", cwd=tmp_path)
    assert_error(done, "Cannot write into file/run", "--out")


def test_an_earlier_run_is_not_overwritten(source, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o/input.xml").touch()
    assert_error(
        nnqmd("run", source, "--model", MODEL, "--out", "o", cwd=tmp_path), "holds a run already", "--force"
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; only root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(source, tmp_path, small_disk):
    (small_disk / "ballast").write_bytes(b"\0" * 960_000)
    words = ("run", source, "--model", MODEL, "--eager", "--workers", "1", "--steps", "40")
    done = nnqmd(*words, "--out", small_disk / "run", cwd=tmp_path)
    assert_error(done, "disk", "Make room")


def test_dipoles_that_do_not_fit_on_the_disk(small_disk):
    import h5py
    import numpy as np

    from nnqmd_server.doors.record import DipoleRecord

    record = DipoleRecord(small_disk / "d.h5", 8, "0" * 64)
    with pytest.raises(OutputError, match=r"disk of .* is full"):
        for _ in range(20_000):
            record.append(np.ones((8, 3)), np.ones(8), np.eye(3))
    record.close()
    with h5py.File(small_disk / "d.h5") as file:  # what was written before can be read
        assert len(file["dipole"]) > 500
    with pytest.raises(OutputError, match=r"disk of .* is full"):
        DipoleRecord(small_disk / "e.h5", 8, "0" * 64)


def test_a_disk_that_is_full_from_the_start(small_disk):
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "ballast").write_bytes(b"\0" * 1_200_000)
    with pytest.raises(OutputError, match="Cannot write into"):
        make_folder(small_disk / "run", force=False)


def test_workers_that_cannot_load_the_model(tmp_path):
    """A package whose code does not load: the worker's last words reach the user."""
    broken = tmp_path / "broken.nequip.zip"
    with zipfile.ZipFile(MODEL) as good, zipfile.ZipFile(broken, "w") as archive:
        for item in good.infolist():
            data = good.read(item)
            archive.writestr(item, b"spoilt" if item.filename.endswith("eager_model.pkl") else data)
    assert_error(
        nnqmd("serve", broken, "--eager", "--workers", "1", cwd=tmp_path),
        "A worker ended",
        "cannot be loaded",
    )


def test_addresses_that_strangers_could_reach_are_refused(tmp_path):
    for address in (
        "tcp://0.0.0.0:5555",
        "tcp://*:5555",
        "tcp://192.168.1.2:5555",
        "udp://localhost:1",
        "nonsense",
    ):
        with pytest.raises(AddressError):
            LocalPool({"ammonia": str(MODEL)}, tmp_path, address=address, workers=1, device="cpu")
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(AddressError, match="open to other users"):
        private_folder(tmp_path / "open")


def test_help_and_version(tmp_path):
    done = nnqmd("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("train", "serve", "run", "spectrum", "model"):
        assert command in done.stdout
    assert "Examples" in nnqmd("run", "--help", cwd=tmp_path).stdout
    assert nnqmd("--version", cwd=tmp_path).stdout.startswith("nnqmd-server ")
