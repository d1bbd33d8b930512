"""`nnqmd spectrum` on a run that i-PI really made."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import constants
from scipy.signal import find_peaks
from spectra_cases import write_ipi_xyz
from test_spectra_modes import ENERGIES, write_euphonic
from typer.testing import CliRunner

from nnqmd_server.cli import spectrum
from nnqmd_server.doors.record import DipoleRecord
from nnqmd_server.errors import DataError, InputError, NnqmdError
from nnqmd_server.spectra.output.nexus import read_nexus
from nnqmd_server.units import AMU_A2_PER_FS2, KB

# Hydrogen and nitrogen on springs of 0.1 hartree/bohr^2, so that all is known exactly
SPRING, TEMPERATURE, N_BEADS, N_STEPS = 0.1, 100.0, 4, 2000
INPUT = f"""
<simulation verbosity='quiet'>
 <output prefix='simulation'>
  <trajectory filename='vc' stride='2' format='xyz'> v_centroid </trajectory>
  <trajectory filename='xc' stride='20'> x_centroid{{angstrom}} </trajectory>
  <trajectory filename='pos' stride='20'> positions{{angstrom}} </trajectory>
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


def row_of(path, symbol):
    """The element's row of the table in a header, by column."""
    lines = path.read_text().splitlines()
    start = lines.index("# elements:")
    names = [n.strip() for n in re.split(r"  +", lines[start + 1].strip("# "))]
    rows = [line.strip("# ").split() for line in lines[start + 2 : start + 4]]
    return dict(zip(names, next(r for r in rows if r[0] == symbol), strict=True))


def test_ins(finished):
    result = run("ins", finished, "--state", "solid")
    assert result.exit_code == 0
    wanted = {"ins.nxs", "ins.txt", "ins.csv", "ins.png", "ins.svg", "ins-map.png", "report.html"}
    assert wanted <= {p.name for p in finished.iterdir()}
    columns = table(finished / "ins.txt")
    energy = columns["energy"]
    # the first rung of the hydrogen ladder, and nothing of hydrogen half-way to it
    first = wavenumber(1.00794)
    H = columns["H_backward"]
    assert H[np.abs(energy - first) < 20].max() > 50 * H[np.abs(energy - 0.5 * first) < 20].max()
    # <u^2> of hydrogen, printed and in the table's header
    u2 = constants.hbar / (2 * 1.00794 * constants.atomic_mass * 2 * np.pi * constants.c * 100 * first) * 1e20
    x = constants.h * constants.c * 100 * first / (2 * constants.k * TEMPERATURE)
    said = row_of(finished / "ins.txt", "H")["<u^2> along Q (A^2)"]
    assert float(said) == pytest.approx(u2 / np.tanh(x), rel=0.01)
    assert said in result.output
    assert "the run is short" in result.output
    assert "chosen by --state" in result.output
    # the beads of this run were not sampled as a ring polymer is, and the check says so
    assert f"Debye-Waller check, {N_BEADS} beads, 101 frames" in result.output
    assert "from the beads" in result.output
    back = read_nexus(finished / "ins.nxs")
    np.testing.assert_allclose(back.data[0]["H_backward"].values, H, rtol=1e-6, atol=1e-12)


def test_dos(finished, tmp_path):
    result = run("dos", finished, "--out", tmp_path)
    assert result.exit_code == 0
    columns = table(tmp_path / "dos.txt")
    for symbol, mass in (("H", 1.00794), ("N", 14.00674)):
        peak = columns["energy"][np.argmax(columns[f"vdos_{symbol}"])]
        assert peak == pytest.approx(wavenumber(mass), abs=8)
    assert (tmp_path / "dos.png").stat().st_size > 20000


def test_ir(finished, tmp_path):
    result = run("ir", finished, "--out", tmp_path / "new", "--lag", "400")
    assert result.exit_code == 0
    assert not (finished / "ir.txt").exists()
    columns = table(tmp_path / "new" / "ir.txt")
    assert columns["wavenumber"][np.argmax(columns["n_alpha"])] == pytest.approx(1600, abs=5)
    assert (tmp_path / "new" / "ir.png").stat().st_size > 10000
    assert "sum rule" in result.output


def test_temperature_skip_and_highest(finished, tmp_path):
    run("ir", finished, "--out", tmp_path, "--temperature", 50, "--skip", 200, "--highest", 2000)
    text = (tmp_path / "ir.txt").read_text()
    assert "temperature: 50 K" in text
    assert "1601 frames" in text
    assert table(tmp_path / "ir.txt")["wavenumber"][-1] == pytest.approx(2000, abs=1)


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


def test_a_last_frame_that_was_cut_off(finished, tmp_path):
    """An error that names file, frame and fix; the fix does what it says."""
    folder, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(finished, folder)
    (found,) = folder.glob("*.vc.xyz")
    text = found.read_text()
    found.write_text(text[: len(text) - 150])
    with pytest.raises(DataError, match=rf"Frame \d+ of .*{found.name}, the last one, is cut off") as caught:
        run("dos", folder, "--out", out)
    assert "--drop-cut" in caught.value.fix
    assert not out.exists()
    result = run("dos", folder, "--out", out, "--drop-cut")
    assert result.exit_code == 0
    assert "cut off" in result.output
    assert (out / "dos.txt").is_file()


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


@pytest.mark.parametrize("command", ["ins", "dos", "ir", "convert"])
def test_help_has_examples(command):
    result = run(command, "--help")
    assert f"nnqmd spectrum {command} runs/ammonia" in result.output
    assert "--temperature" in result.output


@pytest.fixture(scope="module")
def damped(tmp_path_factory):
    """The same springs, classical, under a Langevin thermostat of 40 fs."""
    folder = tmp_path_factory.mktemp("run") / "damped"
    folder.mkdir()
    text = INPUT.replace(f"nbeads='{N_BEADS}'", "nbeads='1'").replace("v_centroid", "velocities")
    thermostat = "<thermostat mode='langevin'><tau units='femtosecond'>40</tau></thermostat>"
    text = text.replace("<dynamics mode='nve'>", f"<dynamics mode='nvt'>{thermostat}")
    (folder / "input.xml").write_text(text.replace(f"<total_steps>{N_STEPS}", "<total_steps>6000"))
    rows = "H 0 0 0\n" * 24
    box = "# CELL(abcABC): 10.0 10.0 10.0 90 90 90 positions{angstrom} cell{angstrom}"
    (folder / "init.xyz").write_text(f"24\n{box}\n{rows}")
    program = shutil.which("i-pi") or str(Path(sys.executable).parent / "i-pi")
    subprocess.run([program, "input.xml"], cwd=folder, check=True, capture_output=True, timeout=200)
    return folder


def test_deconvolution_takes_the_thermostat_out(damped, tmp_path):
    """Friction 1/tau makes a line of 133 cm^-1 FWHM; without it, the line is far narrower."""
    run("dos", damped, "--skip", 200, "--lag", 700, "--deconvolve", "--out", tmp_path)
    observed, free = table(tmp_path / "dos.txt"), table(tmp_path / "dos-deconvolved.txt")
    before = width_of(observed["energy"], observed["vdos_H"])
    after = width_of(free["energy_free"], free["free_H"])
    assert before == pytest.approx(1 / (2 * np.pi * constants.c * 100 * 40e-15), rel=0.3)
    assert after < 0.7 * before
    peak = free["energy_free"][np.argmax(free["free_H"])]
    assert peak == pytest.approx(wavenumber(1.00794), abs=25)
    assert "ISRA" in (tmp_path / "dos.txt").read_text()


def width_of(x, y):
    above = x[y > 0.5 * y.max()]
    return above[-1] - above[0]


def test_deconvolution_needs_a_thermostat(finished, tmp_path):
    with pytest.raises(InputError, match="0 thermostats"):
        run("dos", finished, "--deconvolve", "--out", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def liquid(tmp_path_factory):
    """Hydrogen atoms under friction, free to go anywhere: centroid positions and velocities every fs."""
    folder = tmp_path_factory.mktemp("run") / "liquid"
    folder.mkdir()
    (folder / "input.xml").write_text(INPUT.replace("filename='xc' stride='20'", "filename='xc' stride='2'"))
    rng, friction, n = np.random.default_rng(4), 0.02, 2001
    kick = np.sqrt(KB * TEMPERATURE / (1.00794 * AMU_A2_PER_FS2) * (1 - np.exp(-2 * friction)))
    v = rng.normal(0, kick / np.sqrt(1 - np.exp(-2 * friction)), (n, 16, 3))
    for k in range(1, n):
        v[k] = np.exp(-friction) * v[k - 1] + rng.normal(0, kick, (16, 3))
    write_ipi_xyz(folder / "simulation.vc.xyz", v, 2, ["H"] * 16)
    x = np.cumsum(v, axis=0)
    box = "# CELL(abcABC): 10 10 10 90 90 90 Step: {} Bead: 0 x_centroid{{angstrom}} cell{{angstrom}}"
    with (folder / "simulation.xc.xyz").open("w") as file:
        for k, frame in enumerate(x):
            rows = "".join(f"H {a:.6f} {b:.6f} {c:.6f}\n" for a, b, c in frame)
            file.write(f"16\n{box.format(2 * k)}\n{rows}")
    return folder


def test_a_liquid_is_seen_and_corrected(liquid, tmp_path):
    common = ("--highest", 300, "--lag", 300, "--no-pictures", "--format", "txt")
    result = run("ins", liquid, "--out", tmp_path / "exact", *common)
    assert "treated as a liquid" in result.output
    assert "corrected with the exact classical F(Q,t) of simulation.xc.xyz" in result.output
    assert "corrected by the exact" in (tmp_path / "exact" / "ins.txt").read_text()
    run("ins", liquid, "--out", tmp_path / "gauss", "--no-exact", *common)
    exact, gauss = table(tmp_path / "exact" / "ins.txt"), table(tmp_path / "gauss" / "ins.txt")
    # the motion is Gaussian, so there is nothing to correct but the noise of 16 atoms
    near = np.abs(exact["energy"]) < 20
    assert exact["total_forward"][near].sum() == pytest.approx(gauss["total_forward"][near].sum(), rel=0.1)
    assert not np.array_equal(exact["total_forward"], gauss["total_forward"])


def test_a_liquid_without_positions_says_so(liquid, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(liquid, copy)
    (copy / "simulation.xc.xyz").unlink()
    result = run("ins", copy, "--highest", 300, "--lag", 300, "--no-pictures")
    assert "was not corrected for a liquid" in result.output


def write_extras(folder, name, values, kind):
    """As i-PI writes extras, one file per bead, with every step."""
    for bead in range(N_BEADS):
        with (folder / f"simulation.{name}_{bead}").open("w") as file:
            for step, row in enumerate(values):
                numbers = " ".join(f"{x:16.8e}" for x in row)
                file.write(f" #EXTRAS({kind})# Step:  {step:10d}  Bead:  {bead:5d} \n{numbers}\n")


def test_raman_and_infrared_from_extras(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    t = 0.5 * np.arange(N_STEPS + 1)
    wave = np.cos(2 * np.pi * constants.c * 1e-13 * 1000 * t)[:, None]
    write_extras(copy, "alpha", 10 * np.eye(3).reshape(1, 9) * (1 + 0.01 * wave), "polarizability")
    write_extras(copy, "dip", 0.1 * wave * [1, 2, 3], "dipole")
    result = run("raman", copy, "--extras", "alpha", "--unit", "angstrom3", "--lag", 400, "--laser", 532)
    assert result.exit_code == 0
    columns = table(copy / "raman.txt")
    assert columns["shift"][np.argmax(columns["VV"])] == pytest.approx(1000, abs=8)
    assert columns["VH"].max() < 1e-6 * columns["VV"].max()  # a breathing sphere
    assert (copy / "raman.png").stat().st_size > 20000
    assert 'id="raman"' in (copy / "report.html").read_text()
    run(
        "ir",
        copy,
        "--extras",
        "dip",
        "--unit",
        "eang",
        "--lag",
        400,
        "--no-pictures",
        "--out",
        tmp_path / "dip",
    )
    columns = table(tmp_path / "dip" / "ir.txt")
    assert columns["wavenumber"][np.argmax(columns["n_alpha"])] == pytest.approx(1000, abs=8)
    for command, unit in (("raman", "debye"), ("ir", "")):
        with pytest.raises(NnqmdError, match="unit"):
            run(command, copy, "--extras", "dip", "--unit", unit, "--out", tmp_path / "none")
    with pytest.raises(NnqmdError, match="no bead files"):
        run("raman", copy, "--extras", "nothing", "--unit", "angstrom3")
    with pytest.raises(InputError, match="--laser 5"):
        run("raman", copy, "--extras", "alpha", "--unit", "angstrom3", "--laser", 5)


def test_convert_and_read_again(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    run("dos", copy, "--out", tmp_path / "text", "--no-pictures")
    assert run("convert", copy).exit_code == 0
    (copy / "simulation.vc.xyz").unlink()
    run("dos", copy, "--out", tmp_path / "hdf5", "--no-pictures")
    before, after = table(tmp_path / "text" / "dos.txt"), table(tmp_path / "hdf5" / "dos.txt")
    for name, column in before.items():
        np.testing.assert_allclose(after[name], column, rtol=1e-4, atol=1e-6 * np.abs(column).max())


def test_a_file_instead_of_a_run(finished, tmp_path):
    vc = finished / "simulation.vc.xyz"
    with pytest.raises(InputError, match="does not say its temperature"):
        run("dos", vc, "--out", tmp_path)
    with pytest.raises(DataError, match="how much time lies between"):
        run("dos", vc, "--out", tmp_path, "--temperature", TEMPERATURE)
    assert not list(tmp_path.iterdir())
    run(
        "dos",
        vc,
        "--out",
        tmp_path / "file",
        "--temperature",
        TEMPERATURE,
        "--timestep",
        0.5,
        "--no-pictures",
    )
    run("dos", finished, "--out", tmp_path / "run", "--no-pictures")
    one, other = table(tmp_path / "file" / "dos.txt"), table(tmp_path / "run" / "dos.txt")
    for name, column in one.items():
        np.testing.assert_array_equal(other[name], column)


def test_convert_to_oclimax(finished, tmp_path):
    result = run("convert", finished, "--to", "oclimax", "--out", tmp_path)
    assert "oclimax convert -lt velocity.dump 1" in result.output
    lines = (tmp_path / "velocity.dump").read_text().splitlines()
    assert lines.count("ITEM: ATOMS id type element vx vy vz") == N_STEPS / 2 + 1
    assert lines[9].split()[:3] == ["1", "1", "H"]
    assert "TEMP    = 100.00" in (tmp_path / "out.params").read_text()


def test_direct_geometry_isotopes_and_groups(finished, tmp_path):
    options = ("--instrument", "sequoia", "--ei", 150, "--resolution", 4, "--isotope", "H=D", "--no-pictures")
    result = run("ins", finished, "--out", tmp_path, *options, "--group", "few=0-3", "--state", "solid")
    assert result.exit_code == 0
    columns = table(tmp_path / "ins.txt")
    assert columns["energy"][-1] < 150 / 0.1239842
    assert {"H_3_60deg", "H__few_3_60deg", "N_3_60deg"} <= set(columns)
    text = (tmp_path / "ins.txt").read_text()
    assert "H (few): 7.64 barn (D, periodictable)" in text
    assert "Ei = 150 meV" in text


def test_several_runs_are_one_spectrum(finished, tmp_path):
    """Three times the same run: the same spectrum, and blocks of all three behind the errors."""
    run("dos", finished, "--out", tmp_path / "one", "--lag", 200, "--no-pictures")
    run("dos", *[finished] * 3, "--out", tmp_path / "three", "--lag", 200, "--no-pictures")
    one, three = table(tmp_path / "one" / "dos.txt"), table(tmp_path / "three" / "dos.txt")
    np.testing.assert_allclose(three["vdos_H"], one["vdos_H"], rtol=1e-4, atol=1e-6)
    assert "3 runs" in (tmp_path / "three" / "dos.txt").read_text()
    run("ir", *[finished] * 3, "--out", tmp_path / "three", "--lag", 200, "--no-pictures")
    assert "3 runs" in (tmp_path / "three" / "ir.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--instrument", "sequoia"), "needs an incident energy"),
        (("--ei", "100"), "no meaning for VISION"),
        (("--instrument", "direct", "--ei", "100"), "needs its angles"),
        (("--isotope", "H"), "--isotope H makes no sense"),
        (("--isotope", "Xx=D"), "no atoms or groups called Xx"),
        (("--isotope", "H=Q7"), "no neutron cross-section for 'Q7'"),
        (("--group", "a=1-b"), "--group a=1-b makes no sense"),
        (("--group", "a=900"), "names atom 900"),
        (("--modes", "mesh.yaml"), "either runs or --modes"),
    ],
)
def test_nonsense_about_neutrons(finished, tmp_path, options, message):
    with pytest.raises(NnqmdError, match=message) as caught:
        run("ins", finished, "--out", tmp_path, *options)
    assert caught.value.fix
    assert not list(tmp_path.iterdir())


def test_phonon_modes(tmp_path):
    write_euphonic(tmp_path / "modes.json")
    with pytest.raises(InputError, match="no temperature"):
        run("ins", "--modes", tmp_path / "modes.json")
    run(
        "ins",
        "--modes",
        tmp_path / "modes.json",
        "--temperature",
        10,
        "--out",
        tmp_path / "out",
        "--no-pictures",
    )
    columns = table(tmp_path / "out" / "ins.txt")
    inelastic = columns["total_backward"] - columns["order0_backward"]
    lines = columns["energy"][find_peaks(inelastic, prominence=0.05 * inelastic.max())[0]]
    assert all(np.abs(lines - e).min() < 2 for e in ENERGIES[:6])
    text = (tmp_path / "out" / "ins.txt").read_text()
    assert "harmonic: f from phonon modes" in text
    assert "note:" not in text


@pytest.mark.parametrize(("charges", "message"), [("H=x", "makes no sense"), ("H=0.3", "says nothing of N")])
def test_nonsense_about_charges(finished, tmp_path, charges, message):
    with pytest.raises(InputError, match=message):
        run("ir", finished, "--out", tmp_path, "--charges", charges)


def test_infrared_of_fixed_charges(finished, tmp_path):
    run("ir", finished, "--out", tmp_path, "--charges", "H=0.3,N=-0.9", "--no-pictures", "--lag", 400)
    columns = table(tmp_path / "ir.txt")
    peak = columns["wavenumber"][np.argmax(columns["n_alpha"])]
    assert peak == pytest.approx(wavenumber(1.00794), abs=8) or peak == pytest.approx(
        wavenumber(14.00674), abs=8
    )
    assert "charges times velocities" in (tmp_path / "ir.txt").read_text()


def test_beside_an_experiment(finished, tmp_path):
    run("ins", finished, "--out", tmp_path, "--no-pictures", "--format", "nxs")
    assert {p.name for p in tmp_path.iterdir()} == {"ins.nxs", "report.html"}
    computed = read_nexus(tmp_path / "ins.nxs").data[0]
    rows = np.column_stack([computed.axes[0].values, 40 * computed.curves[0].values])
    np.savetxt(tmp_path / "measured.dat", rows, header="wavenumber (cm-1)  counts")
    result = run("draw", tmp_path / "ins.nxs", "--experiment", tmp_path / "measured.dat")
    assert "times 0.025 " in result.output
    assert (tmp_path / "ins-experiment.png").stat().st_size > 20000


def test_runs_of_different_temperatures(finished, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    text = (other / "input.xml").read_text()
    (other / "input.xml").write_text(text.replace(f"{TEMPERATURE}</temperature>", "150</temperature>"))
    with pytest.raises(InputError, match="different temperatures"):
        run("ins", finished, other, "--out", tmp_path / "out")
    with pytest.raises(InputError, match="Several runs"):
        run("ins", finished, finished)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--experiment-unit", "THz", "makes no sense"),
        ("--experiment", "nothing.dat", "cannot be read"),
    ],
)
def test_nonsense_about_an_experiment(finished, tmp_path, option, value, message):
    with pytest.raises(NnqmdError, match=message):
        run("ins", finished, "--out", tmp_path, option, value)
    assert not list(tmp_path.iterdir())
