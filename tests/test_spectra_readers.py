"""Every trajectory format against the program that writes it, and every kind of broken file."""

import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ase.units
import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.io import read as ase_read
from ase.io import write as ase_write
from ase.io.trajectory import Trajectory as AseTrajectory
from spectra_cases import write_ipi_xyz

from nnqmd_server.errors import DataError, OutputError
from nnqmd_server.spectra import dipole_files, store
from nnqmd_server.spectra.readers.numbers import fixed_numbers
from nnqmd_server.spectra.store import convert
from nnqmd_server.spectra.trajectory import open_beads, open_trajectory
from nnqmd_server.units import BOHR, DEBYE

INPUT = """
<simulation verbosity='quiet'>
 <output prefix='simulation'>
  <trajectory filename='xc' stride='2' format='xyz'> x_centroid </trajectory>
  <trajectory filename='vc' stride='2' format='xyz'> v_centroid </trajectory>
  <trajectory filename='pos' stride='2' format='xyz'> positions{angstrom} </trajectory>
  <trajectory filename='pos_au' stride='2' format='xyz' cell_units='angstrom'> positions </trajectory>
  <trajectory filename='pos_pdb' stride='2' format='pdb'> positions </trajectory>
  <trajectory filename='pos_ase' stride='2' format='ase'> positions </trajectory>
  <trajectory filename='vel_ase' stride='2' format='ase'> velocities </trajectory>
  <trajectory filename='vel' stride='2' format='xyz'> velocities{m/s} </trajectory>
 </output>
 <total_steps>140</total_steps>
 <prng><seed>1</seed></prng>
 <ffdirect name='h'><pes>harmonic</pes><parameters>{k1:0.1}</parameters></ffdirect>
 <system>
  <initialize nbeads='3'><file mode='xyz'>init.xyz</file>
   <velocities mode='thermal' units='kelvin'>600</velocities>
  </initialize>
  <forces><force forcefield='h'/></forces>
  <motion mode='dynamics'><dynamics mode='nve'>
   <timestep units='femtosecond'>0.5</timestep></dynamics></motion>
  <ensemble><temperature units='kelvin'>300</temperature></ensemble>
 </system>
</simulation>
"""
INIT = """4
# CELL(abcABC): 9.0 10.0 11.0 80 95 100 positions{angstrom} cell{angstrom}
N 0 0 0
H 0.1 0 0
H 0 0.1 0
O 0 0 0.1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ipi")
    (folder / "input.xml").write_text(INPUT)
    (folder / "init.xyz").write_text(INIT)
    program = shutil.which("i-pi") or str(Path(sys.executable).parent / "i-pi")
    subprocess.run([program, "input.xml"], cwd=folder, check=True, capture_output=True, timeout=120)
    return folder


def all_of(trajectory, size=None):
    blocks = list(trajectory.blocks(size))
    cells = None if blocks[0].cells is None else np.concatenate([b.cells for b in blocks])
    return np.concatenate([b.values for b in blocks]), np.concatenate([b.steps for b in blocks]), cells


def test_beads_average_to_the_centroid(run):
    for beads, centroid in (("pos", "xc"), ("vel", "vc")):
        found = open_beads(run / f"simulation.{beads}_0.xyz", timestep=0.5)
        assert found.n_beads == 3
        one = open_trajectory(run / f"simulation.{centroid}.xyz", 0.5)
        average, exact = all_of(found)[0].mean(axis=1), all_of(one)[0][:, 0]
        assert average == pytest.approx(exact, abs=1e-5 * np.abs(exact).max() + 1e-5)
        assert found.load().steps == pytest.approx(np.arange(0, 141, 2))


def test_every_format_of_ipi_holds_the_same_positions(run):
    reference, steps, cells = all_of(open_beads(run / "simulation.pos", timestep=0.5))
    assert reference.shape == (71, 3, 4, 3)
    for name in ("pos_0.xyz", "pos_pdb_0.pdb", "pos_ase_0.extxyz"):
        assert open_trajectory(run / f"simulation.{name}", 0.5).about_frames == pytest.approx(71, abs=1)
    assert np.linalg.det(cells[0]) == pytest.approx(
        990
        * np.sqrt(
            1 - sum(np.cos(np.radians((80, 95, 100))) ** 2) + 2 * np.prod(np.cos(np.radians((80, 95, 100))))
        ),
        rel=1e-5,
    )
    for name, tolerance in (("pos_au", 1e-5), ("pos_pdb", 6e-4), ("pos_ase", 1e-6)):
        values, same_steps, same_cells = all_of(open_beads(run / f"simulation.{name}", timestep=0.5), 7)
        assert values == pytest.approx(reference, abs=tolerance), name
        assert np.array_equal(same_steps, steps)
        assert same_cells == pytest.approx(cells, abs=2e-3)
    velocities = all_of(open_beads(run / "simulation.vel", timestep=0.5))[0]
    ase_velocities = all_of(open_beads(run / "simulation.vel_ase_1.extxyz", timestep=0.5))[0]
    assert ase_velocities == pytest.approx(velocities, rel=1e-5, abs=1e-8)


def test_pdb_and_extended_xyz_as_ase_reads_them(run):
    ours = all_of(open_trajectory(run / "simulation.pos_pdb_1.pdb", 0.5))
    theirs = ase_read(run / "simulation.pos_pdb_1.pdb", index=":", format="proteindatabank")
    # i-PI writes END, not ENDMDL, so ASE sees the last frame's atoms; the first is enough to compare
    assert ours[0][0, 0] == pytest.approx(theirs[0].positions[:4], abs=1e-9)
    images = ase_read(run / "simulation.vel_ase_1.extxyz", index=":")
    v = np.array([i.arrays["velocities"] for i in images]) * ase.units.fs
    assert all_of(open_trajectory(run / "simulation.vel_ase_1.extxyz", 0.5))[0][:, 0] == pytest.approx(
        v, rel=1e-9
    )
    assert all_of(open_trajectory(run / "simulation.vel_ase_1.extxyz", 0.5))[2][0] == pytest.approx(
        images[0].cell.array, rel=1e-9
    )


def test_numbers_are_those_of_python():
    rng = np.random.default_rng(3)
    values = rng.normal(size=20000) * 10.0 ** rng.integers(-14, 20, 20000)
    words = [f"{v:12.5e}" for v in values]
    text = np.frombuffer("".join(words).encode(), np.uint8).reshape(-1, 12)
    assert np.array_equal(fixed_numbers(text), [float(w) for w in words])
    for bad in ("         nan", " 1.23456e-3x", " 1.2345e-103", "-1.23456E-01", " 1.23456e-01"):
        word = np.frombuffer(bad.encode(), np.uint8).reshape(1, 12)
        assert (fixed_numbers(word) is None) == (bad != " 1.23456e-01")


def test_fixed_rows_and_words_give_the_same(tmp_path):
    velocities = np.random.default_rng(0).normal(size=(100, 3, 3))
    write_ipi_xyz(tmp_path / "a.xyz", velocities, 2, ["H", "H", "O"])
    text = (tmp_path / "a.xyz").read_text()
    (tmp_path / "b.xyz").write_text(text.replace("       O ", "     O "))  # other widths: read by words
    a, b = (all_of(open_trajectory(tmp_path / f"{n}.xyz", 0.5), 13) for n in "ab")
    assert np.array_equal(a[0], b[0])
    assert np.array_equal(a[1], b[1])
    # one odd frame in the middle, and what follows it
    (tmp_path / "c.xyz").write_text(text.replace("Step:         100 ", "Step: 100 "))
    c = all_of(open_trajectory(tmp_path / "c.xyz", 0.5), 13)
    assert np.array_equal(a[0], c[0])


def water():
    places = [[0, 0, 0], [0.96, 0, 0], [-0.2, 0.9, 0]]
    return Atoms("OHH", places, cell=[[8, 0, 0], [1, 9, 0], [-2, 1, 7]], pbc=True)


def lammps_dump(
    path, positions, velocities, cell, steps, units="metal", time=True, columns="xu yu zu", extra=None
):
    """A dump as LAMMPS writes it, its atoms in another order in every frame; ``cell`` lower triangular."""
    rng = np.random.default_rng(1)
    with path.open("w") as file:
        for k, step in enumerate(steps):
            if units:
                file.write(f"ITEM: UNITS\n{units}\n")
            if time:
                file.write(f"ITEM: TIME\n{step * 0.0005}\n")
            file.write(f"ITEM: TIMESTEP\n{step}\nITEM: NUMBER OF ATOMS\n{positions.shape[1]}\n")
            xy, xz, yz = cell[1, 0], cell[2, 0], cell[2, 1]
            low = [min(0, xy, xz, xy + xz), min(0, yz), 0.0]
            high = [cell[0, 0] + max(0, xy, xz, xy + xz), cell[1, 1] + max(0, yz), cell[2, 2]]
            file.write("ITEM: BOX BOUNDS xy xz yz pp pp pp\n")
            for a, b, t in zip(low, high, (xy, xz, yz), strict=True):
                file.write(f"{a:.10g} {b:.10g} {t:.10g}\n")
            more = " ix iy iz" if extra is not None else ""
            file.write(f"ITEM: ATOMS id type element {columns} vx vy vz{more}\n")
            for a in rng.permutation(positions.shape[1]):
                row = [*positions[k, a], *velocities[k, a]]
                tail = " " + " ".join(str(int(i)) for i in extra[k, a]) if extra is not None else ""
                symbol = "OHH"[a]
                file.write(
                    f"{a + 1} {'OH'.index(symbol) + 1} {symbol} "
                    + " ".join(f"{x:.10g}" for x in row)
                    + tail
                    + "\n"
                )


@pytest.fixture
def moving():
    rng = np.random.default_rng(5)
    t = 0.5 * np.arange(80)
    start = water().positions
    velocities = rng.normal(size=(1, 3, 3)) * 0.3 * np.ones((80, 1, 1))
    return start + velocities * t[:, None, None], velocities, water().cell.array


def test_lammps(tmp_path, moving):
    positions, velocities, cell = moving
    path = tmp_path / "a.dump"
    lammps_dump(path, positions, velocities * 1e3, cell, range(0, 80))  # metal: A/ps
    opened = open_trajectory(path, quantity="velocities")
    assert (opened.symbols, opened.interval) == (("O", "H", "H"), pytest.approx(0.5))
    assert all_of(opened)[0][:, 0] == pytest.approx(velocities, rel=1e-8)
    found, steps, cells = all_of(open_trajectory(path, quantity="positions"), 9)
    assert found[:, 0] == pytest.approx(positions, abs=1e-7)
    assert cells[0] == pytest.approx(cell, abs=1e-9)
    images = ase_read(path, index=":", format="lammps-dump-text")
    assert found[:, 0] == pytest.approx(np.array([i.positions for i in images]), abs=1e-7)
    assert cells[0] == pytest.approx(images[0].cell.array, abs=1e-7)
    assert np.array_equal(steps, np.arange(80))


@pytest.mark.parametrize("scaled", [False, True])
def test_lammps_wrapped_with_image_flags(tmp_path, moving, scaled):
    positions, velocities, cell = moving
    turns = np.floor(positions @ np.linalg.inv(cell))
    inside = positions - turns @ cell
    columns = "xs ys zs" if scaled else "x y z"
    shown = inside @ np.linalg.inv(cell) if scaled else inside
    lammps_dump(tmp_path / "a.dump", shown, velocities, cell, range(80), columns=columns, extra=turns)
    found = all_of(open_trajectory(tmp_path / "a.dump", quantity="positions"))[0][:, 0]
    assert found == pytest.approx(positions, abs=1e-6)
    assert np.abs(turns).max() >= 1
    # without the flags the jumps are seen, and undone on request
    lammps_dump(tmp_path / "b.dump", shown, velocities, cell, range(80), columns=columns)
    with pytest.raises(DataError, match=r"Frame \d+ of .*b\.dump: atom \d.*wrapped into the cell") as caught:
        all_of(open_trajectory(tmp_path / "b.dump", quantity="positions"))
    assert "unwrap=True (--unwrap)" in caught.value.fix
    for size in (None, 7):
        undone = all_of(open_trajectory(tmp_path / "b.dump", quantity="positions", unwrap=True), size)[0][
            :, 0
        ]
        assert undone - undone[0] == pytest.approx(positions - positions[0], abs=1e-6)


def test_lammps_that_does_not_say_its_units_or_time(tmp_path, moving):
    positions, velocities, cell = moving
    path = tmp_path / "a.dump"
    lammps_dump(path, positions, velocities, cell, range(0, 160, 2), units="", time=False)
    with pytest.raises(DataError, match="does not say its units") as caught:
        open_trajectory(path, timestep=0.5)
    assert "unit= (--unit)" in caught.value.fix
    with pytest.raises(DataError, match="how much time") as caught:
        open_trajectory(path, unit="real")
    assert "timestep= (--timestep)" in caught.value.fix
    real = open_trajectory(path, 0.5, unit="real")
    assert real.interval == 1.0
    assert all_of(real)[0][:, 0] == pytest.approx(velocities, rel=1e-8)
    lammps_dump(path, positions, velocities, cell, range(80))
    with pytest.raises(DataError, match="says its units are 'metal'"):
        open_trajectory(path, unit="real")
    with pytest.raises(DataError, match=r"0\.5 fs by the file, but 1 fs"):
        open_trajectory(path, timestep=1.0)
    path.write_text(path.read_text().replace("element", "energy"))
    with pytest.raises(DataError, match="which elements") as caught:
        open_trajectory(path)
    assert "symbols= (--symbols" in caught.value.fix
    assert open_trajectory(path, symbols=["O", "D"]).symbols == ("O", "D", "D")


def test_ase_trajectory(tmp_path, moving):
    positions, velocities, _ = moving
    atoms = water()
    with AseTrajectory(str(tmp_path / "a.traj"), "w") as file:
        for x, v in zip(positions, velocities, strict=True):
            atoms.positions = x
            atoms.set_velocities(v / ase.units.fs)
            file.write(atoms)
    with pytest.raises(DataError, match="how much time") as caught:
        open_trajectory(tmp_path / "a.traj")
    assert "interval= (--interval)" in caught.value.fix
    opened = open_trajectory(tmp_path / "a.traj", interval=0.5)
    assert (opened.quantity, opened.n_frames, opened.interval) == ("velocities", 80, 0.5)
    assert all_of(opened)[0][:, 0] == pytest.approx(velocities, rel=1e-10)
    places = open_trajectory(tmp_path / "a.traj", interval=0.5, quantity="positions", unwrap=True)
    assert all_of(places, 7)[0][:, 0] == pytest.approx(positions, abs=1e-10)
    whole = (tmp_path / "a.traj").read_bytes()
    (tmp_path / "b.traj").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        all_of(open_trajectory(tmp_path / "b.traj", interval=0.5))
    assert "b.traj" in caught.value.what


def test_extended_xyz_of_ase(tmp_path, moving):
    positions, velocities, _ = moving
    images = []
    for x, v in zip(positions, velocities, strict=True):
        image = water()
        image.positions = x
        image.arrays["speed"] = v
        images.append(image)
    ase_write(tmp_path / "a.xyz", images, format="extxyz")
    places = open_trajectory(
        tmp_path / "a.xyz", interval=0.5, unwrap=True
    )  # pos is in Angstrom by definition
    assert all_of(places)[0][:, 0] == pytest.approx(positions, abs=1e-7)
    assert all_of(places)[2][0] == pytest.approx(images[0].cell.array)
    with pytest.raises(
        DataError, match="no column of three numbers called 'velocities', only species, pos, speed"
    ):
        open_trajectory(tmp_path / "a.xyz", interval=0.5, quantity="velocities")


def test_a_plain_xyz_says_nothing_and_needs_everything(tmp_path):
    rows = "".join("2\n\nH 0.0 0.0 %f\nO 1 2 3\n" % (0.01 * k) for k in range(70))
    (tmp_path / "a.xyz").write_text(rows)
    options = {"quantity": "positions", "unit": "angstrom", "interval": 0.5}
    for left_out in options:
        given = {k: v for k, v in options.items() if k != left_out}
        with pytest.raises(DataError) as caught:
            open_trajectory(tmp_path / "a.xyz", **given)
        assert f"{left_out}= (--{left_out})" in caught.value.fix
    values, steps, cells = all_of(open_trajectory(tmp_path / "a.xyz", **options))
    assert values[:, 0, 0, 2] == pytest.approx(0.01 * np.arange(70))
    assert cells is None
    assert np.array_equal(steps, np.arange(70))


def test_units_that_contradict(tmp_path):
    write_ipi_xyz(tmp_path / "a.xyz", np.zeros((80, 1, 3)), 1, ["H"])
    for options, message in (
        ({"unit": "m/s"}, "in 'atomic_unit', but 'm/s' was asked for"),
        ({"quantity": "velocities"}, "holds v_centroid, not velocities"),
        ({"cell_unit": "angstrom"}, "cell is in 'atomic_unit', but 'angstrom'"),
        ({"interval": 7.0}, "0.5 fs by a time step of 0.5 fs, but 7 fs"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_trajectory(tmp_path / "a.xyz", 0.5, **options)
        assert "--" in caught.value.fix


def test_a_missing_bead(run, tmp_path):
    for k in (0, 2):
        shutil.copy(run / f"simulation.pos_{k}.xyz", tmp_path)
    with pytest.raises(DataError, match=r"bead 1, .*simulation\.pos_1\.xyz, is missing; 2 of 3"):
        open_beads(tmp_path / "simulation.pos_0.xyz", timestep=0.5)
    (tmp_path / "simulation.pos_2.xyz").unlink()
    with pytest.raises(DataError, match=r"bead 1, .* is missing; 1 of 3"):
        open_beads(tmp_path / "simulation.pos", n_beads=3, timestep=0.5)
    with pytest.raises(DataError, match="no bead files"):
        open_beads(tmp_path / "simulation.vel", timestep=0.5)


def test_beads_of_different_length_or_runs(run, tmp_path):
    for k in range(3):
        shutil.copy(run / f"simulation.pos_{k}.xyz", tmp_path)
    last = tmp_path / "simulation.pos_2.xyz"
    lines = last.read_text().splitlines(keepends=True)
    last.write_text("".join(lines[: 6 * 40]))
    with pytest.raises(DataError, match=r"Frame 40 of .*pos_2\.xyz .* only one of the two has it"):
        all_of(open_beads(tmp_path / "simulation.pos", timestep=0.5))
    with pytest.raises(DataError, match=r"Frame 40 of .*pos_2\.xyz"):  # also at the border of a block
        all_of(open_beads(tmp_path / "simulation.pos", timestep=0.5), 8)
    last.write_text("".join(lines).replace("angstrom}  cell", "atomic_unit}  cell"))
    with pytest.raises(DataError, match=r"differs .* in its unit"):
        open_beads(tmp_path / "simulation.pos", timestep=0.5)


@pytest.mark.parametrize("size", [None, 7, 10])
def test_a_kill_between_the_files_of_one_frame(run, tmp_path, size):
    """Beads 0 and 1 have the last frame, bead 2 has lost it or half of it."""
    for k in range(3):
        shutil.copy(run / f"simulation.pos_{k}.xyz", tmp_path)
    last = tmp_path / "simulation.pos_2.xyz"
    lines = last.read_text().splitlines(keepends=True)
    for text in ("".join(lines[:-6]), "".join(lines)[:-70]):
        last.write_text(text)
        with pytest.raises(DataError, match=r"Frame 70 of .*pos_2\.xyz"):
            all_of(open_beads(tmp_path / "simulation.pos", timestep=0.5), size)
        short = open_beads(tmp_path / "simulation.pos", timestep=0.5, drop_cut=True)
        assert all_of(short, size)[0].shape == (70, 3, 4, 3)
        assert "left out" in short.warnings[0]
    last.write_text("".join(lines[:-12]))
    with pytest.raises(DataError, match=r"Frame 69 of .*pos_2\.xyz"):
        all_of(open_beads(tmp_path / "simulation.pos", timestep=0.5, drop_cut=True), size)


def broken(path, change):
    write_ipi_xyz(path, np.random.default_rng(0).normal(size=(100, 2, 3)), 1, ["H", "O"])
    lines = path.read_text().splitlines(keepends=True)
    change(lines)
    path.write_text("".join(lines))


def cut(lines):
    lines[-1] = lines[-1][:20]


def not_finite(lines):
    lines[4 * 77 + 3] = "       O  1.00000e+00          nan  1.00000e+00\n"


def more_atoms(lines):
    lines[4 * 50] = "3\n"
    lines[4 * 50 + 3] += "       H  1.00000e+00  1.00000e+00  1.00000e+00\n"


def two_runs(lines):
    lines[4 * 60 :] = lines[: 4 * 40]


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        (cut, r"Frame 99 of .*a\.xyz, the last one, is cut off", "--drop-cut"),
        (not_finite, r"Frame 77 of .*a\.xyz holds a value of atom 1 that is not finite", "time step"),
        (more_atoms, r"Frame 50 of .*a\.xyz has other contents \(3 atoms\)", "Two runs"),
        (two_runs, r"steps in .*a\.xyz are not even: frame 59 at step 59 is followed by step 0", "cut"),
        (lambda lines: lines.clear(), r"a\.xyz is empty", "wrote"),
        (lambda lines: lines.__delitem__(slice(4, None)), r"one frame only", "Run longer"),
    ],
)
@pytest.mark.parametrize("size", [None, 8])
def test_broken_files_name_file_frame_and_fix_and_leave_nothing(tmp_path, change, message, fix, size):
    path = tmp_path / "a.xyz"
    broken(path, change)
    with pytest.raises(DataError, match=message) as caught:
        all_of(open_trajectory(path, 0.5), size)
    assert fix in caught.value.fix
    with pytest.raises(DataError, match=message):
        convert(open_trajectory(path, 0.5), tmp_path / "run.h5")
    assert [f.name for f in tmp_path.iterdir()] == ["a.xyz"]


@pytest.mark.parametrize("ending", [".pdb", ".dump", ".extxyz"])
def test_cut_files_of_other_formats(run, tmp_path, moving, ending):
    path = tmp_path / f"a{ending}"
    if ending == ".dump":
        lammps_dump(path, *moving, range(80))
    else:
        name = "pos_pdb_0.pdb" if ending == ".pdb" else "pos_ase_0.extxyz"
        shutil.copy(run / f"simulation.{name}", path)
    n = len(all_of(open_trajectory(path, 0.5))[0])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=rf"Frame {n - 1} of .*a{ending}, the last one, is cut off"):
        all_of(open_trajectory(path, 0.5))
    short = open_trajectory(path, 0.5, drop_cut=True)
    assert len(all_of(short)[0]) == n - 1
    assert "left out" in short.warnings[0]


def test_convert_and_read_back(run, tmp_path):
    beads = open_beads(run / "simulation.pos", timestep=0.5)
    centroid = open_trajectory(run / "simulation.vc.xyz", 0.5)
    seen = []
    path = convert([beads, centroid], tmp_path / "run.h5", seen.append)
    assert seen[-1] == 1.0
    assert store.quantities_in(path) == ("positions", "v_centroid")
    with pytest.raises(DataError, match="several quantities: positions, v_centroid") as caught:
        open_trajectory(path)
    assert "--quantity" in caught.value.fix
    for original, quantity in ((beads, "positions"), (centroid, "v_centroid")):
        back = open_trajectory(path, quantity=quantity)
        assert (back.interval, back.symbols, back.n_frames) == (1.0, original.symbols, 71)
        values, steps, cells = all_of(original)
        again, same_steps, same_cells = all_of(back, 9)
        assert again == pytest.approx(values, rel=1e-7)  # six digits in single precision
        assert np.array_equal(steps, same_steps)
        assert same_cells == pytest.approx(cells)
        some = all_of(back.of_atoms([3, 1]))[0]
        assert np.array_equal(some, again[:, :, [3, 1]])
        assert back.of_atoms([3, 1]).of_atoms([1]).symbols == ("H",)
    assert [f.name for f in tmp_path.iterdir()] == ["run.h5"]
    # a changing cell is kept frame by frame, a constant one once
    with h5py.File(path) as file:
        assert file["positions/cell"].shape == (1, 3, 3)


def test_convert_keeps_double_precision_and_a_changing_cell(tmp_path, moving):
    positions, velocities, cell = moving
    lammps_dump(tmp_path / "a.dump", positions, velocities, cell, range(80))
    text = (tmp_path / "a.dump").read_text().split("ITEM: UNITS")
    text[50] = text[50].replace(
        "ITEM: BOX BOUNDS xy xz yz pp pp pp\n-2 ", "ITEM: BOX BOUNDS xy xz yz pp pp pp\n-2.1 "
    )
    (tmp_path / "a.dump").write_text("ITEM: UNITS".join(text))
    opened = open_trajectory(tmp_path / "a.dump", quantity="positions")
    values, _, cells = all_of(opened)
    assert cells[49, 0, 0] == pytest.approx(8.1)
    convert(opened, tmp_path / "run.h5")
    again, _, same_cells = all_of(open_trajectory(tmp_path / "run.h5"))
    assert np.array_equal(again, values)
    assert np.array_equal(same_cells, cells)


def test_convert_refuses_mixtures_and_places_it_cannot_write(run, tmp_path):
    centroid = open_trajectory(run / "simulation.vc.xyz", 0.5)
    with pytest.raises(DataError, match="both hold v_centroid"):
        convert([centroid, centroid], tmp_path / "run.h5")
    with pytest.raises(OutputError, match="cannot be written"):
        convert(centroid, tmp_path / "nowhere" / "run.h5")
    write_ipi_xyz(tmp_path / "other.xyz", np.zeros((80, 1, 3)), 1, ["H"])
    with pytest.raises(DataError, match="other atoms"):
        convert([centroid, open_trajectory(tmp_path / "other.xyz", 0.5)], tmp_path / "run.h5")
    assert [f.name for f in tmp_path.iterdir()] == ["other.xyz"]


def test_a_foreign_hdf5_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match="format is 'nothing'"):
        open_trajectory(tmp_path / "a.h5")


def test_skip_and_blocks(tmp_path):
    velocities = np.random.default_rng(0).normal(size=(100, 2, 3)) * 1e-2
    write_ipi_xyz(tmp_path / "a.xyz", velocities, 4, ["H", "O"])
    opened = open_trajectory(tmp_path / "a.xyz", 0.5)
    assert (opened.interval, opened.about_frames) == (2.0, 100)
    blocks = list(opened.blocks(7, skip=30.0))
    assert blocks[0].steps[0] == 60
    assert [b.first for b in blocks][:3] == [0, 6, 13]
    assert sum(len(b.steps) for b in blocks) == 85
    with pytest.raises(DataError, match="leaves nothing"):
        list(opened.blocks(skip=1e5))


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path):
    def peak(n):
        write_ipi_xyz(tmp_path / "a.xyz", np.ones((n, 20, 3)), 1, ["H"] * 20)
        opened = open_trajectory(tmp_path / "a.xyz", 0.5)
        tracemalloc.start()
        for _ in opened.blocks(50):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(2000) < 1.2 * peak(400)


def extras(path, values, name="dipole"):
    with path.open("w") as file:
        for k, row in enumerate(values):
            file.write(
                f" #EXTRAS({name})# Step:  {4 * k:10d} \n" + " ".join(f"{v:16.8e}" for v in row) + "\n"
            )


def test_dipoles_from_ipis_extras(tmp_path):
    values = np.random.default_rng(0).normal(size=(2, 80, 3))
    for bead in range(2):
        extras(tmp_path / f"simulation.dip_{bead}", values[bead])
    cell = 10 * np.eye(3)
    with pytest.raises(DataError, match="does not say the unit") as caught:
        dipole_files.read_dipole_extras(tmp_path / "simulation.dip", 0.5, cell)
    assert "--unit" in caught.value.fix
    for unit, scale in (("debye", DEBYE), ("atomic_unit", BOHR), ("eang", 1.0)):
        found = dipole_files.read_dipole_extras(tmp_path / "simulation.dip_0", 0.5, cell, unit)
        assert found.dipole == pytest.approx(scale * values.transpose(1, 0, 2), abs=1e-7)
        assert found.interval == 2.0
        assert found.cell.shape == (80, 3, 3)
    lines = (tmp_path / "simulation.dip_1").read_text()
    (tmp_path / "simulation.dip_1").write_text(lines[:-5])
    with pytest.raises(DataError, match=r"Frame 79 of .*dip_1, the last one, is cut off"):
        dipole_files.read_dipole_extras(tmp_path / "simulation.dip", 0.5, cell, "debye")
    (tmp_path / "simulation.dip_1").unlink()
    with pytest.raises(DataError, match="bead 1"):
        dipole_files.read_dipole_extras(tmp_path / "simulation.dip", 0.5, cell, "debye", n_beads=2)


def test_polarizabilities_from_ipis_extras(tmp_path):
    a = np.random.default_rng(0).normal(size=(80, 3, 3))
    a = a + a.transpose(0, 2, 1)
    extras(tmp_path / "simulation.pol_0", a.reshape(80, 9), "polarizability")
    found = dipole_files.read_polarizability_extras(tmp_path / "simulation.pol_0", 0.5, "atomic_unit")
    assert found.polarizability[:, 0] == pytest.approx(BOHR**3 * a, abs=1e-6)
    a[:, 0, 1] += 5
    extras(tmp_path / "simulation.pol_0", a.reshape(80, 9), "polarizability")
    with pytest.raises(DataError, match="not symmetric"):
        dipole_files.read_polarizability_extras(tmp_path / "simulation.pol_0", 0.5, "atomic_unit")
