"""Reading what i-PI and the dipole record wrote."""

import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from scipy import signal
from spectra_cases import write_ipi_xyz

from nnqmd_server.errors import DataError
from nnqmd_server.spectra import correlation
from nnqmd_server.spectra.dipole_files import read_dipoles
from nnqmd_server.spectra.running import velocity_correlations
from nnqmd_server.spectra.trajectory import masses_of, open_trajectory
from nnqmd_server.units import ATOMIC_TIME, BOHR


def read_velocities(path, timestep, unit=None, **options):
    return open_trajectory(path, timestep, unit=unit, **options).load()


INPUT = """
<simulation verbosity='quiet'>
 <output prefix='simulation'>
  <trajectory filename='vc' stride='2' format='xyz'> v_centroid </trajectory>
  <trajectory filename='si' stride='2' format='xyz'> v_centroid{m/s} </trajectory>
  <trajectory filename='xc' stride='2' format='xyz'> x_centroid{angstrom} </trajectory>
 </output>
 <total_steps>140</total_steps>
 <prng><seed>1</seed></prng>
 <ffdirect name='h'><pes>harmonic</pes><parameters>{k1:0.1}</parameters></ffdirect>
 <system>
  <initialize nbeads='2'><file mode='xyz'>init.xyz</file>
   <velocities mode='thermal' units='kelvin'>100</velocities>
  </initialize>
  <forces><force forcefield='h'/></forces>
  <motion mode='dynamics'><dynamics mode='nve'>
   <timestep units='femtosecond'>0.5</timestep></dynamics></motion>
  <ensemble><temperature units='kelvin'>100</temperature></ensemble>
 </system>
</simulation>
"""
INIT = """4
# CELL(abcABC): 10.0 10.0 10.0 90 90 90 positions{angstrom} cell{angstrom}
N 0 0 0
H 1 0 0
H 0 1 0
D 0 0 1
"""


@pytest.fixture(scope="module")
def ipi_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ipi")
    (folder / "input.xml").write_text(INPUT)
    (folder / "init.xyz").write_text(INIT)
    program = shutil.which("i-pi") or str(shutil.which("i-pi", path=str(sys.executable).rpartition("/")[0]))
    subprocess.run([program, "input.xml"], cwd=folder, check=True, capture_output=True, timeout=120)
    return folder


def test_agrees_with_ipis_own_reader(ipi_run):
    from ipi.utils.io import read_file

    ours = read_velocities(ipi_run / "simulation.vc.xyz", 0.5)
    frames = []
    with (ipi_run / "simulation.vc.xyz").open() as file:
        for _ in range(len(ours.steps)):
            atoms = read_file("xyz", file)["atoms"]
            frames.append(atoms.q.reshape(-1, 3).copy())
        with pytest.raises(EOFError):
            read_file("xyz", file)
    assert ours.symbols == tuple(atoms.names) == ("N", "H", "H", "D")
    assert ours.velocities == pytest.approx(np.array(frames) * BOHR / ATOMIC_TIME, rel=1e-12)
    assert list(ours.steps) == list(range(0, 141, 2))
    assert ours.interval == 1.0
    assert ours.quantity == "v_centroid"
    assert not ours.warnings


def test_both_units_of_ipi_are_the_same_velocities(ipi_run):
    atomic = read_velocities(ipi_run / "simulation.vc.xyz", 0.5)
    si = read_velocities(ipi_run / "simulation.si.xyz", 0.5, "m/s")
    assert si.velocities == pytest.approx(atomic.velocities, rel=1e-5)
    assert np.abs(atomic.velocities).max() > 1e-4


def test_velocities_are_the_derivative_of_the_positions(ipi_run):
    """i-PI's positions in Angstrom and our velocities in Angstrom/fs must belong together."""
    velocities = read_velocities(ipi_run / "simulation.vc.xyz", 0.5)
    rows = [r.split() for r in (ipi_run / "simulation.xc.xyz").read_text().splitlines()]
    positions = np.array([r[1:] for r in rows if len(r) == 4], dtype=float).reshape(-1, 4, 3)
    central = (positions[2:] - positions[:-2]) / (2 * velocities.interval)
    close = np.corrcoef(central.ravel(), velocities.velocities[1:-1].ravel())[0, 1]
    slope = (central * velocities.velocities[1:-1]).sum() / (velocities.velocities[1:-1] ** 2).sum()
    assert close > 0.999
    assert slope == pytest.approx(1, abs=0.05)


def test_positions_are_not_velocities(ipi_run):
    with pytest.raises(DataError, match="x_centroid, not v_centroid"):
        open_trajectory(ipi_run / "simulation.xc.xyz", 0.5, quantity="v_centroid")
    with pytest.raises(DataError, match="x_centroid, not velocities"):
        velocity_correlations(open_trajectory(ipi_run / "simulation.xc.xyz", 0.5), 20)


@pytest.fixture
def good(tmp_path):
    velocities = np.random.default_rng(0).normal(size=(80, 2, 3)) * 1e-3
    path = tmp_path / "vc.xyz"
    write_ipi_xyz(path, velocities, 2, ["N", "H"])
    return path


def edit(path, old, new, count=-1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


@pytest.mark.parametrize(
    ("old", "new", "count", "message"),
    [
        ("v_centroid{atomic_unit}", "", -1, "what it holds"),
        ("v_centroid{atomic_unit}", "v_centroid", -1, "what it holds"),
        ("v_centroid{atomic_unit}", "v_centroid{}", -1, "in which unit"),
        ("v_centroid{atomic_unit}", "v_centroid{furlong}", -1, "'furlong'"),
        ("v_centroid{atomic_unit}", "v_centroid{m/s}", 1, "other contents"),
        ("v_centroid{atomic_unit}", "f_centroid{atomic_unit}", -1, "no spectrum"),
        ("Step:  ", "Stop:  ", -1, "how much time"),
        ("Step:          50", "Step:          49", -1, "not even"),
        ("Step:          52", "Step:          50", -1, "not even"),
        ("       N ", "       O ", 1, "other contents"),
        ("2\n# CELL", "3\n# CELL", 1, "not an xyz frame"),
        ("       H ", "       H nan ", 1, "not an xyz frame"),
        ("2\n# CELL", "two\n# CELL", 1, "number of atoms"),
    ],
)
def test_what_ipi_would_not_write_is_refused(good, old, new, count, message):
    edit(good, old, new, count)
    with pytest.raises(DataError, match=message) as caught:
        read_velocities(good, 0.5)
    assert caught.value.fix


def test_values_that_are_not_finite_are_refused(good):
    text = good.read_text().splitlines()
    text[4 * 30 + 2] = "       N          nan  1.00000e-03  1.00000e-03"
    good.write_text("\n".join(text) + "\n")
    with pytest.raises(DataError, match=r"Frame 30 .* not finite"):
        read_velocities(good, 0.5)


def test_input_and_file_must_agree_on_the_unit(good):
    read_velocities(good, 0.5, "atomic_unit")
    with pytest.raises(DataError, match="'m/s' was asked for"):
        read_velocities(good, 0.5, "m/s")


@pytest.mark.parametrize("cut", [1, 3, 30, 100, 201])
def test_a_cut_last_frame_is_an_error_or_left_out_and_said(good, cut):
    whole = read_velocities(good, 0.5)
    good.write_bytes(good.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"Frame 79 of .*vc\.xyz, the last one, is cut off") as caught:
        read_velocities(good, 0.5)
    assert "drop_cut=True (--drop-cut)" in caught.value.fix
    short = read_velocities(good, 0.5, drop_cut=True)
    assert np.array_equal(short.velocities, whole.velocities[: len(short.steps)])
    assert len(short.steps) == 79
    assert "cut off" in short.warnings[0]


def test_too_few_frames(good):
    good.write_text("\n".join(good.read_text().splitlines()[: 4 * 20]) + "\n")
    with pytest.raises(DataError, match="20 whole frames"):
        read_velocities(good, 0.5)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_velocities(tmp_path / "vc.xyz", 0.5)
    (tmp_path / "vc.xyz").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_velocities(tmp_path / "vc.xyz", 0.5)


def test_skip(good):
    velocities = read_velocities(good, 0.5)
    assert velocities.after(10.0).steps[0] == 20
    assert velocities.after(9.5).steps[0] == 20
    with pytest.raises(DataError, match="at least 64"):
        velocities.after(40.0)


def test_masses_are_ipis():
    assert masses_of(("H", "D", "N")) == pytest.approx([1.00794, 2.0141, 14.00674])
    with pytest.raises(DataError, match="Qq"):
        masses_of(("Qq",))


def write_dipoles(path, n=100, **changes):
    with h5py.File(path, "w") as file:
        file.attrs["format"] = changes.get("format", "nnqmd dipoles 1")
        file["force_set"] = changes.get("force_set", np.arange(n))
        file["dipole"] = changes.get("dipole", np.random.default_rng(0).normal(size=(n, 3, 3)))
        file["dipole"].attrs["unit"] = changes.get("unit", "e Angstrom")
        file["energy"] = np.zeros((n, 3))
        file["cell"] = np.tile(10 * np.eye(3), (n, 1, 1))


def test_dipoles(tmp_path):
    write_dipoles(tmp_path / "d.h5")
    dipoles = read_dipoles(tmp_path / "d.h5", 0.25)
    assert dipoles.dipole.shape == (100, 3, 3)
    assert dipoles.interval == 0.25
    assert dipoles.after(5.0).dipole[0] == pytest.approx(dipoles.dipole[20])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "nnqmd dipoles 2"}, "format"),
        ({"unit": "debye"}, "debye"),
        ({"force_set": np.r_[0:50, 60:110]}, "not even"),
        ({"dipole": np.full((100, 3, 3), np.nan)}, "finite"),
        ({"n": 10}, "10 force sets"),
        ({"dipole": np.zeros((90, 3, 3))}, "fit together"),
    ],
)
def test_dipoles_that_are_refused(tmp_path, changes, message):
    write_dipoles(tmp_path / "d.h5", **changes)
    with pytest.raises(DataError, match=message):
        read_dipoles(tmp_path / "d.h5", 0.5)


def test_a_file_that_is_no_hdf5(tmp_path):
    (tmp_path / "d.h5").write_text("no")
    with pytest.raises(DataError, match="not a readable"):
        read_dipoles(tmp_path / "d.h5", 0.5)


def test_autocorrelation_is_the_direct_sum():
    series = np.random.default_rng(6).normal(size=(97, 2, 3))
    found = correlation.autocorrelation(series, 40)
    for lag in (0, 1, 17, 39):
        direct = np.mean(np.sum(series[: 97 - lag] * series[lag:], axis=-1), axis=0)
        assert found[lag] == pytest.approx(direct, abs=1e-12)
    tensors = correlation.velocity_tensors(series, 40)
    traces = tensors[:, :3].sum(axis=1).T
    assert traces == pytest.approx(found, abs=1e-12)
    cross = signal.correlate(series[:, 1, 0], series[:, 1, 2])
    symmetric = 0.5 * (cross[96 + 17] + cross[96 - 17]) / (97 - 17)
    assert tensors[1, 4, 17] == pytest.approx(symmetric, abs=1e-12)
