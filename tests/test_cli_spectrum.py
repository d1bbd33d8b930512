"""`nnqmd spectrum` on a run that i-PI really made."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import constants
from typer.testing import CliRunner

from nnqmd_server.cli import spectrum
from nnqmd_server.doors.record import DipoleRecord
from nnqmd_server.errors import DataError, InputError, NnqmdError

# Hydrogen and nitrogen on springs of 0.1 hartree/bohr^2, so that all is known exactly
SPRING, TEMPERATURE, N_BEADS, N_STEPS = 0.1, 100.0, 4, 2000
INPUT = f"""
<simulation verbosity='quiet'>
 <output prefix='simulation'>
  <trajectory filename='vc' stride='2' format='xyz'> v_centroid </trajectory>
  <trajectory filename='xc' stride='20'> x_centroid{{angstrom}} </trajectory>
 </output>
 <total_steps>{N_STEPS}</total_steps>
 <prng><seed>7</seed></prng>
 <ffdirect name='h'><pes>harmonic</pes><parameters>{{k1:{SPRING}}}</parameters></ffdirect>
 <system>
  <initialize nbeads='{N_BEADS}'><file mode='xyz'>init.xyz</file>
   <velocities mode='thermal' units='kelvin'>{2 * TEMPERATURE}</velocities></initialize>
  <forces><force forcefield='h'/></forces>
  <motion mode='dynamics'><fixcom>False</fixcom><dynamics mode='nve'>
   <timestep units='femtosecond'>0.5</timestep></dynamics></motion>
  <ensemble><temperature units='kelvin'>{TEMPERATURE}</temperature></ensemble>
 </system>
</simulation>
"""


def wavenumber(mass):
    omega = np.sqrt(SPRING * constants.value("Hartree energy") / constants.value("Bohr radius") ** 2)
    return omega / np.sqrt(mass * constants.atomic_mass) / (2 * np.pi * constants.c * 100)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "harmonic"
    folder.mkdir()
    (folder / "input.xml").write_text(INPUT)
    atoms = ["H"] * 24 + ["N"] * 8
    rows = "".join(f"{symbol} 0 0 0\n" for symbol in atoms)
    box = "# CELL(abcABC): 10.0 10.0 10.0 90 90 90 positions{angstrom} cell{angstrom}"
    (folder / "init.xyz").write_text(f"{len(atoms)}\n{box}\n{rows}")
    program = shutil.which("i-pi") or str(Path(sys.executable).parent / "i-pi")
    subprocess.run([program, "input.xml"], cwd=folder, check=True, capture_output=True, timeout=200)
    record = DipoleRecord(folder / "dipoles.h5", N_BEADS, "0" * 64)
    t = 0.5 * np.arange(N_STEPS + 1)
    dipole = 0.1 * np.cos(2 * np.pi * constants.c * 1e-13 * 1600 * t[:, None, None] + np.arange(3))
    for row in np.tile(dipole, (1, N_BEADS, 1)):
        record.append(row, np.zeros(N_BEADS), 10 * np.eye(3))
    record.close()
    return folder


def run(*arguments):
    result = CliRunner().invoke(spectrum.app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def table(path):
    names = [row for row in path.read_text().splitlines() if row.startswith("#")][-1].split()[1:]
    return dict(zip(names, np.loadtxt(path).T, strict=True))


def test_ins(finished):
    result = run("ins", finished, "--state", "solid")
    assert result.exit_code == 0
    assert (finished / "ins.png").stat().st_size > 20000
    columns = table(finished / "ins.txt")
    energy = columns["deltaE[cm^-1]"]
    for symbol, mass in (("H", 1.00794), ("N", 14.00674)):
        peak = energy[np.argmax(columns[f"vdos-{symbol}[cm]"])]
        assert peak == pytest.approx(wavenumber(mass), abs=8)
    # the first rung of the hydrogen ladder, and nothing of hydrogen half-way to it
    first = wavenumber(1.00794)
    H = columns["H-backward"]
    assert H[np.abs(energy - first) < 20].max() > 50 * H[np.abs(energy - 0.5 * first) < 20].max()
    # <u^2> of hydrogen, printed and in the table's header
    u2 = constants.hbar / (2 * 1.00794 * constants.atomic_mass * 2 * np.pi * constants.c * 100 * first) * 1e20
    x = constants.h * constants.c * 100 * first / (2 * constants.k * TEMPERATURE)
    said = float((finished / "ins.txt").read_text().split("<u^2> along Q = ")[1].split()[0])
    assert said == pytest.approx(u2 / np.tanh(x), rel=0.01)
    assert f"{said:.4f}" in result.output
    assert "the run is short" in result.output
    assert "chosen by --state" in result.output


def test_ir(finished, tmp_path):
    result = run("ir", finished, "--out", tmp_path / "new", "--lag", "400")
    assert result.exit_code == 0
    assert not (finished / "ir.txt").exists()
    columns = table(tmp_path / "new" / "ir.txt")
    assert columns["wavenumber[cm^-1]"][np.argmax(columns["n*alpha[cm^-1]"])] == pytest.approx(1600, abs=5)
    assert (tmp_path / "new" / "ir.png").stat().st_size > 10000
    assert "sum rule" in result.output


def test_temperature_skip_and_highest(finished, tmp_path):
    run("ir", finished, "--out", tmp_path, "--temperature", 50, "--skip", 200, "--highest", 2000)
    text = (tmp_path / "ir.txt").read_text()
    assert "T = 50 K" in text
    assert "1601 frames" in text
    assert table(tmp_path / "ir.txt")["wavenumber[cm^-1]"][-1] == pytest.approx(2000, abs=1)


@pytest.mark.parametrize(
    ("command", "options", "kind"),
    [
        ("ins", ("--temperature", "-5"), InputError),
        ("ins", ("--temperature", "nan"), InputError),
        ("ins", ("--skip", "-1"), InputError),
        ("ins", ("--skip", "990"), DataError),
        ("ins", ("--lag", "0"), InputError),
        ("ins", ("--lag", "5000"), DataError),
        ("ins", ("--highest", "10"), InputError),
        ("ir", ("--lag", "3"), DataError),
        ("ir", ("--highest", "1e9"), InputError),
        ("ir", ("--skip", "1e6"), DataError),
    ],
)
def test_nonsense_is_refused_with_a_fix(finished, tmp_path, command, options, kind):
    with pytest.raises(kind) as caught:
        run(command, finished, "--out", tmp_path, *options)
    assert caught.value.fix
    assert not list(tmp_path.iterdir())


def test_not_a_run(tmp_path):
    with pytest.raises(NnqmdError, match=r"no input\.xml"):
        run("ins", tmp_path)


def test_a_run_without_centroid_velocities(finished, tmp_path):
    text = (finished / "input.xml").read_text()
    (tmp_path / "input.xml").write_text(text.replace("v_centroid", "velocities"))
    with pytest.raises(InputError, match="writes no v_centroid"):
        run("ins", tmp_path)


def test_input_and_trajectory_of_different_runs(finished, tmp_path):
    text = (finished / "input.xml").read_text()
    (tmp_path / "input.xml").write_text(text.replace("filename='vc' stride='2'", "filename='vc' stride='4'"))
    shutil.copy(finished / "simulation.vc.xyz", tmp_path)
    with pytest.raises(DataError, match="every 2 steps, the input says every 4"):
        run("ins", tmp_path)


def test_dipoles_of_another_run(finished, tmp_path):
    text = (finished / "input.xml").read_text()
    shutil.copy(finished / "dipoles.h5", tmp_path)
    for old, new, message in (
        (f"nbeads='{N_BEADS}'", "nbeads='8'", "beads"),
        (str(N_STEPS), "500", "force sets"),
    ):
        (tmp_path / "input.xml").write_text(text.replace(old, new))
        with pytest.raises(DataError, match=message):
            run("ir", tmp_path)


@pytest.mark.parametrize("command", ["ins", "ir"])
def test_help_has_examples(command):
    result = run(command, "--help")
    assert f"nnqmd spectrum {command} runs/ammonia" in result.output
    assert "--temperature" in result.output
