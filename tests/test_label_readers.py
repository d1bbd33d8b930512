"""Readers of labelled data: units, signs, refusals, and Wannier centres from densities."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import read, write
from ase.io.cube import write_cube
from typer.testing import CliRunner

from nnqmd_server.cli import app
from nnqmd_server.errors import DataError, InputError
from nnqmd_server.labels import centres, cp2k_input, cp2k_output, cp2k_run
from nnqmd_server.labels.convert import Reading, read_files
from nnqmd_server.labels.cp2k_run import Cp2k
from nnqmd_server.labels.extxyz import parse_units
from nnqmd_server.training import data as training
from nnqmd_server.units import BOHR, GPA, HARTREE

ROOT = Path(__file__).parents[1]
CP2K = Path(__file__).parent / "data/cp2k-2023-nh3.out"
SHIPPED = ROOT / "examples/ammonia/data/ammonia_train.xyz"
CELL = np.array([[5.1, 0.0, 0.0], [0.8, 5.6, 0.0], [-0.4, 0.7, 6.2]])


def shipped(name):
    return next(frame for frame in read(SHIPPED, ":") if frame.info["source_id"] == name)


def ammonia_box(n=2, seed=0):
    random = np.random.default_rng(seed)
    atoms = Atoms(cell=CELL * 1.6, pbc=True)
    for place in random.permutation(np.array([[0.1, 0.2, 0.9], [0.6, 0.7, 0.4], [0.1, 0.7, 0.4]]))[:n]:
        one = molecule("NH3")
        one.rotate(random.uniform(0, 180), random.normal(size=3))
        atoms += Atoms(one.numbers, one.positions + place @ atoms.cell.array)
    return atoms


def changed(tmp_path, *pairs):
    text = CP2K.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "run.out"
    path.write_text(text)
    return path


# --- CP2K's output ---


def test_cp2k_labels_are_those_of_the_shipped_frame():
    (frame,) = read_files([CP2K], Reading())
    wanted = shipped("solid16_a522_T300_f000")
    assert frame.get_potential_energy() == pytest.approx(wanted.get_potential_energy(), abs=1e-8)
    assert np.abs(frame.get_forces() - wanted.get_forces()).max() < 2e-8
    assert np.abs(frame.get_stress() - wanted.get_stress()).max() < 1e-12
    assert np.abs(frame.positions - wanted.positions).max() < 1e-6
    assert np.abs(frame.cell.array - wanted.cell.array).max() < 1e-6


def test_cp2k_2025_prints_the_same_numbers_in_another_layout(tmp_path):
    old = cp2k_output.read_output(CP2K)
    lines = CP2K.read_text().splitlines()
    first = next(k for k, line in enumerate(lines) if "ATOMIC FORCES" in line)
    rows = [line.split() for line in lines[first + 3 : first + 19]]
    table = [" FORCES| Atomic forces [hartree/bohr]", " FORCES|   Atom     x    y    z    |f|"]
    table += [f" FORCES| {row[0]:>6} {row[3]} {row[4]} {row[5]} 1.00000000E-01" for row in rows]
    text = "\n".join([*lines[:first], *table, " FORCES| Sum  0.0 0.0 0.0", *lines[first + 20 :]])
    text = text.replace("energy [a.u.]:", "energy [hartree]")
    for line in lines:
        if line.startswith((" STRESS|      x  ", " STRESS|      y  ", " STRESS|      z  ")) and "." in line:
            numbers = " ".join(f"{1e4 * float(x):.11E}" for x in line.split()[2:])
            text = text.replace(line, f" STRESS|      {line.split()[1]}  {numbers}")
    path = tmp_path / "new.out"
    path.write_text(text.replace("tensor [GPa]", "tensor [bar]"))
    new = cp2k_output.read_output(path)
    assert new.energy == old.energy
    assert np.array_equal(new.forces, old.forces)
    assert np.allclose(new.stress, old.stress, rtol=1e-10)


def test_cp2k_stress_is_minus_what_is_printed():
    assert cp2k_output.read_output(CP2K).stress[0, 0] == pytest.approx(-5.07884549997 * GPA)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("*** SCF run converged in    13 steps ***", "*** SCF run NOT converged ***", "not converge"),
        ("PROGRAM ENDED AT", "PROGRAM WAS KILLED", "did not end"),
        ("tensor [GPa]", "tensor [furlong]", "'furlong'"),
        ("energy [a.u.]", "energy [kJ/mol]", "0 energies"),
        ("   -0.0185620387", "             NaN", "15 forces for 16 atoms"),
        ("ATOMIC FORCES in", "NO FORCES", "has no forces"),
        ("CP2K| version", "CP3K| version", "not an output of CP2K"),
    ],
)
def test_cp2k_output_that_cannot_be_used_is_refused(tmp_path, old, new, words):
    path = changed(tmp_path, (old, new))
    with pytest.raises(DataError, match=words) as caught:
        read_files([path], Reading(form="cp2k"))
    assert "run.out" in caught.value.what
    assert caught.value.fix


def test_cp2k_output_of_several_structures_is_refused(tmp_path):
    path = tmp_path / "md.out"
    path.write_text(CP2K.read_text() * 2)
    with pytest.raises(DataError, match="2 energies"):
        read_files([path], Reading())


def test_printed_centres_belong_to_their_structure(tmp_path):
    (frame,) = read_files([CP2K], Reading())
    places = np.repeat(frame.positions[::4], 4, axis=0) + 0.3 * np.random.default_rng(1).normal(size=(16, 3))
    rows = [
        f"{s} {x:.10f} {y:.10f} {z:.10f}"
        for s, (x, y, z) in zip([*frame.symbols, *"X" * 16], [*frame.positions, *places], strict=True)
    ]
    path = tmp_path / "wan.xyz"
    path.write_text("\n".join(["32", " Particles+Wannier centers. Iteration:1_0", *rows]) + "\n")
    assert np.allclose(cp2k_output.printed_centres(path, frame), places, atol=1e-9)
    moved = frame.copy()
    moved.positions[3] += 0.01
    with pytest.raises(DataError, match=r"0\.01 Angstrom elsewhere"):
        cp2k_output.printed_centres(path, moved)


# --- Wannier centres ---


def density(place, cell, points, widths):
    """A periodic, asymmetric density: two Gaussians whose common centre is known."""
    grid = np.stack(np.meshgrid(*(np.arange(n) / n for n in points), indexing="ij"), axis=-1)
    total = np.zeros(points)
    for weight, shift, width in ((0.7, np.array([0.3, -0.2, 0.1]), widths[0]),
                                 (0.3, np.array([-0.7, 1.4 / 3, -0.7 / 3]), widths[1])):  # fmt: skip
        away = grid @ cell - (place + shift)
        fraction = away @ np.linalg.inv(cell)
        away = (fraction - np.round(fraction)) @ cell
        total += weight * np.exp(-0.5 * (away**2).sum(-1) / width**2) / (2 * np.pi) ** 1.5 / width**3
    return total


@pytest.mark.parametrize("place", [(0.1, 0.2, 0.3), (5.0, 5.5, 6.1), (2.6, 0.0, 3.0)])
def test_first_moment_is_exact_where_the_phase_is_not(place):
    cell = 1.5 * CELL
    values = density(np.array(place), cell, (48, 50, 54), (0.45, 0.6))
    found = centres.first_moment(np.sqrt(values), np.zeros(3), cell)
    away = (found - place) @ np.linalg.inv(cell)
    assert np.abs((away - np.round(away)) @ cell).max() < 2e-4
    marginal = values.sum(axis=(1, 2))
    phase = np.angle((marginal * np.exp(2j * np.pi * np.arange(48) / 48)).sum()) / (2 * np.pi)
    error = phase - (found @ np.linalg.inv(cell))[0]
    assert abs(error - round(error)) * np.linalg.norm(cell[0]) > 2e-3


def test_the_centre_does_not_depend_on_the_grid():
    # |w|^2 folds back on a grid that is just fine enough for w
    cell, place = 1.5 * CELL, np.array([2.1, 3.3, 1.2])
    fine = np.sqrt(density(place, cell, (96, 100, 108), (0.45, 0.6)))
    coarse = fine[::4, ::4, ::4]
    away = centres.first_moment(fine, np.zeros(3), cell) - centres.first_moment(coarse, np.zeros(3), cell)
    assert np.abs(away).max() < 1e-6  # 2e-5 without interpolation


def cube_of(atoms, place, path, points=(40, 44, 48), cell=None):
    values = np.sqrt(density(place, atoms.cell.array, points, (0.45, 0.6))) * BOHR**1.5
    grid = atoms.copy()
    grid.calc = None
    if cell is not None:
        grid.set_cell(cell, scale_atoms=False)
    with path.open("w") as stream:
        write_cube(stream, grid, data=values)


def test_centres_are_read_from_cubes_in_any_cell(tmp_path):
    atoms = ammonia_box()
    places = atoms.positions[[0, 4]] + [[0.1, 0.2, 0.3], [-0.3, 0.1, 0.0]]
    paths = [tmp_path / f"w-locHOMO_w{k}_s1-1_0.cube" for k in (1, 2)]
    for place, path in zip(places, paths, strict=True):
        cube_of(atoms, place, path)
    found = centres.centres_of_cubes(paths, atoms)
    away = (found - places) @ np.linalg.inv(atoms.cell.array)
    assert np.abs((away - np.round(away)) @ atoms.cell.array).max() < 5e-4


def test_a_grid_that_overlaps_itself_is_refused(tmp_path):
    # an odd grid with a stride of 2: one plane too many
    atoms, path = ammonia_box(), tmp_path / "w-locHOMO_w1_s1-1_0.cube"
    cube_of(atoms, atoms.positions[0], path, cell=atoms.cell.array * [[76 / 75], [1], [1]])
    with pytest.raises(DataError, match="does not fill the cell once"):
        centres.centres_of_cubes([path], atoms)


def test_an_odd_grid_is_written_again_and_whole(tmp_path, monkeypatch):
    """The second run of CP2K appends to the centres that the first one printed."""
    atoms = ammonia_box()
    place = atoms.positions[0] + [0.1, 0.2, 0.3]
    strides = []

    def run(code, folder, name, text):
        strides.append(int(re.search(r"STRIDE (\d)", text)[1]))
        cell = atoms.cell.array * [[76 / 75], [1], [1]] if strides[-1] == 2 else None
        cube_of(atoms, place, folder / "wannier-w_w1_s1-1_0.cube", cell=cell)
        rows = [f"{s} {x:.10f} {y:.10f} {z:.10f}" for s, (x, y, z) in zip(
            [*atoms.symbols, "X"], [*atoms.positions, place], strict=True)]  # fmt: skip
        with (folder / "wannier-wan.xyz").open("a") as file:
            file.write("\n".join([str(len(rows)), "", *rows]) + "\n")
        (folder / "wannier.out").write_text(" Localization  for spin   1 converged in  10 iterations\n")
        return folder / "wannier.out"

    monkeypatch.setattr(cp2k_run, "_run", run)
    text = cp2k_input.shipped(cp2k_input.WANNIER)
    code = Cp2k(("cp2k",), "2023.1", "", text, None, ("N",))
    first = cp2k_input.wannier_input(text, atoms, "wannier", 2)
    (found,) = cp2k_run._centres(atoms, tmp_path, code, first)
    assert strides == [2, 1]
    away = (found - place) @ np.linalg.inv(atoms.cell.array)
    assert np.abs((away - np.round(away)) @ atoms.cell.array).max() < 5e-4


def test_an_orbital_without_norm_one_is_refused(tmp_path):
    atoms, path = ammonia_box(), tmp_path / "w.cube"
    values = (
        1.01 * np.sqrt(density(atoms.positions[0], atoms.cell.array, (40, 40, 40), (0.5, 0.6))) * BOHR**1.5
    )
    with path.open("w") as stream:
        write_cube(stream, atoms, data=values)
    with pytest.raises(DataError, match=r"norm 1\.02"):
        centres.centres_of_cubes([path], atoms)


def test_cubes_of_another_structure_are_refused(tmp_path):
    atoms, path = ammonia_box(), tmp_path / "w.cube"
    cube_of(atoms, atoms.positions[0], path)
    atoms.positions[2] += 0.01
    with pytest.raises(DataError, match="another structure"):
        centres.centres_of_cubes([path], atoms)


def four_each(atoms):
    """Centres as in ammonia: on the bonds and opposite to them, per N."""
    places = []
    for n in range(0, len(atoms), 4):
        arms = atoms.get_distances(n, [n + 1, n + 2, n + 3], mic=True, vector=True)
        places += [atoms.positions[n] + 0.6 * arm for arm in arms]
        places.append(atoms.positions[n] - 0.35 * arms.sum(axis=0) / np.linalg.norm(arms.sum(axis=0)))
    return np.array(places)


def test_centres_go_to_their_atoms_whatever_their_order_and_image():
    atoms = ammonia_box()
    places = four_each(atoms)
    random = np.random.default_rng(3)
    one, other = atoms.copy(), atoms.copy()
    centres.add_centres(one, places, (), ("x", 0))
    images = random.integers(-2, 3, size=(len(places), 3)) @ atoms.cell.array
    centres.add_centres(other, random.permutation(places + images), ("N",), ("x", 0))
    for name in ("wannier_centroid", "wannier_centres"):
        assert np.allclose(one.arrays[name], other.arrays[name], atol=1e-9)
    assert one.arrays["wannier_centres"].shape == (8, 12)
    first = one.arrays["wannier_centres"][4].reshape(4, 3)
    assert np.allclose(first, places[4:] - atoms.positions[4], atol=1e-9)  # bonds in order, lone pair last
    assert np.allclose(one.arrays["wannier_centroid"][4], first.mean(axis=0))
    assert not one.arrays["wannier_centroid"][1:4].any()


def test_unequal_numbers_of_centres_are_refused():
    atoms = ammonia_box(3)
    places = four_each(atoms)
    places[0] = places[5]
    with pytest.raises(DataError, match="gives 5 Wannier centres to N atom 4, but 3 to N atom 0") as caught:
        centres.add_centres(atoms, places, (), ("calc.out", 7))
    assert "Frame 7" in caught.value.what


# --- extended XYZ ---


def other_file(path, **labels):
    frame = ammonia_box()
    plain = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=True)
    for name, value in labels.items():
        (plain.arrays if np.shape(value)[:1] == (8,) else plain.info)[name] = value
    write(path, plain, format="extxyz")
    return frame


def test_other_keys_and_units(tmp_path):
    path = tmp_path / "other.xyz"
    forces = np.random.default_rng(0).normal(size=(8, 3))
    other_file(path, E_dft=-3.0, F_dft=forces, S_dft=np.diag([1.0, 2.0, 3.0]))
    keys = {"energy": "E_dft", "forces": "F_dft", "stress": "S_dft"}
    units = parse_units("energy=hartree,forces=hartree/bohr,stress=GPa")
    (frame,) = read_files([path], Reading(keys=keys, units=units))
    assert frame.get_potential_energy() == pytest.approx(-3 * HARTREE)
    assert np.allclose(frame.get_forces(), forces * HARTREE / BOHR, atol=1e-6)
    assert frame.get_stress()[2] == pytest.approx(3 * GPA)
    with pytest.raises(DataError, match="unit of 'E_dft'"):
        read_files([path], Reading(keys=keys))
    with pytest.raises(DataError, match="has no 'energy'") as caught:
        read_files([path], Reading())
    assert "E_dft" in caught.value.fix


@pytest.mark.parametrize(
    "text", ["energy=eV/angstrom", "forces=eV", "stress=eV/angstrom^2", "mass=amu", "energy"]
)
def test_units_that_do_not_fit_are_refused(text):
    with pytest.raises(InputError):
        parse_units(text)


def test_energy_units_agree_with_ase():
    from ase import units

    found = parse_units("energy=kcal/mol,forces=kJ/mol/nm,stress=hartree/bohr^3")
    assert found["energy"] == pytest.approx(units.kcal / units.mol, rel=1e-8)
    assert found["forces"] == pytest.approx(units.kJ / units.mol / units.nm, rel=1e-8)
    assert found["stress"] == pytest.approx(units.Hartree / units.Bohr**3, rel=1e-8)


def test_virial_becomes_stress_and_a_wrong_sign_is_found(tmp_path):
    path = tmp_path / "v.xyz"
    virial = np.diag([1.0, 2.0, 3.0])
    frame = other_file(path, energy=-1.0, forces=np.zeros((8, 3)), virial=virial)
    (found,) = read_files([path], Reading())
    assert np.allclose(found.get_stress(voigt=False), -virial / frame.get_volume())
    stress = virial / frame.get_volume()  # as if virial = +V stress
    other_file(path, energy=-1.0, forces=np.zeros((8, 3)), virial=virial, stress=stress)
    with pytest.raises(DataError, match="same sign"):
        read_files([path], Reading())


def test_what_is_not_finite_is_refused_with_its_frame(tmp_path):
    path = tmp_path / "n.xyz"
    forces = np.zeros((8, 3))
    other_file(path, energy=-1.0, forces=forces)
    good = path.read_text()
    forces[3, 1] = np.nan
    other_file(path, energy=-1.0, forces=forces)
    path.write_text(good + path.read_text())
    with pytest.raises(DataError, match=r"Frame 1 \(counted from 0\) of .*n\.xyz holds forces"):
        read_files([path], Reading())


def test_the_shipped_data_go_through_unchanged(tmp_path):
    out = tmp_path / "again.xyz"
    result = CliRunner().invoke(app, ["data", "convert", str(SHIPPED), "--out", str(out)])
    assert result.exit_code == 0, result.output
    before, after = read(SHIPPED, ":"), training.read_frames(out)
    training.check(after, ("N", "H"), ("N",))
    assert training.groups_of(after, "config_type") == training.groups_of(before, "config_type")
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old.get_forces(), new.get_forces())
        assert np.array_equal(old.arrays["wannier_centroid"], new.arrays["wannier_centroid"])
        assert np.allclose(old.get_stress(), new.get_stress(), atol=1e-15)


# --- VASP and DeePMD ---

VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <generator><i name="version" type="string">6.3.0  </i></generator>
 <incar><i name="ISMEAR" type="int"> 0</i></incar>
 <kpoints><generation param="Gamma"><v type="int" name="divisions">1 1 1</v></generation>
  <varray name="kpointlist"><v>0.0 0.0 0.0</v></varray><varray name="weights"><v>1.0</v></varray></kpoints>
 <parameters><separator name="electronic"><i type="int" name="NELM">    3</i></separator>
  <separator name="response functions"><i type="int" name="NELM">     1</i></separator></parameters>
 <atominfo><atoms> 2 </atoms><types> 1 </types>
  <array name="atoms"><set><rc><c>H </c><c> 1</c></rc><rc><c>H </c><c> 1</c></rc></set></array>
  <array name="atomtypes"><set><rc><c> 2</c><c>H </c><c>1.0</c><c>1.0</c><c>PAW_PBE H</c></rc></set></array>
 </atominfo>
 <structure name="initialpos">{structure}</structure>
 <calculation>{steps}<structure>{structure}</structure>
  <varray name="forces"><v>0.1 0.0 -0.2</v><v>-0.1 0.0 0.2</v></varray>
  <varray name="stress"><v>10.0 0.0 1.0</v><v>0.0 20.0 0.0</v><v>1.0 0.0 30.0</v></varray>
  <energy><i name="e_fr_energy">-6.5</i><i name="e_wo_entrp">-6.3</i><i name="e_0_energy">-6.4</i></energy>
 </calculation>
</modeling>
"""
STRUCTURE = """<crystal><varray name="basis"><v>5.0 0.0 0.0</v><v>0.0 5.0 0.0</v><v>0.0 0.0 5.0</v>
 </varray><i name="volume">125.0</i></crystal>
 <varray name="positions"><v>0.0 0.0 0.0</v><v>0.15 0.0 0.0</v></varray>"""
STEP = """<scstep><energy><i name="e_fr_energy">-6.5</i><i name="e_wo_entrp">-6.3</i>
 <i name="e_0_energy">-6.4</i></energy></scstep>"""


def test_vasp_energy_is_the_free_one_and_its_stress_changes_sign(tmp_path):
    path = tmp_path / "vasprun.xml"
    path.write_text(VASPRUN.format(structure=STRUCTURE, steps=2 * STEP))
    (frame,) = read_files([path], Reading())
    assert frame.get_potential_energy() == -6.5
    assert np.allclose(frame.get_forces()[1], [-0.1, 0.0, 0.2])
    assert frame.get_stress()[0] == pytest.approx(-10 * 0.1 * GPA, rel=1e-6)  # VASP prints pressure in kbar
    assert frame.info["label_code"] == "VASP 6.3.0"
    assert frame.info["config_type"] == tmp_path.name


def test_vasp_steps_that_did_not_converge_are_refused(tmp_path):
    path = tmp_path / "vasprun.xml"
    path.write_text(VASPRUN.format(structure=STRUCTURE, steps=3 * STEP))
    with pytest.raises(DataError, match="ended at NELM"):
        read_files([path], Reading())
    path.write_text("<modeling><structure>")
    with pytest.raises(DataError, match="cannot be read as VASP"):
        read_files([path], Reading())


def deepmd_system(folder, frames, names=True):
    (folder / "set.000").mkdir(parents=True)
    kinds = sorted(set(frames[0].get_chemical_symbols()), reverse=True)
    (folder / "type.raw").write_text("\n".join(str(kinds.index(s)) for s in frames[0].symbols) + "\n")
    if names:
        (folder / "type_map.raw").write_text("\n".join(kinds) + "\n")
    rows = {
        "coord": [f.positions.ravel() for f in frames],
        "box": [f.cell.array.ravel() for f in frames],
        "energy": [f.get_potential_energy() for f in frames],
        "force": [f.get_forces().ravel() for f in frames],
        "virial": [(-f.get_volume() * f.get_stress(voigt=False)).ravel() for f in frames],
    }
    for name, values in rows.items():
        np.save(folder / "set.000" / f"{name}.npy", np.array(values))


@pytest.mark.peer
@pytest.mark.skipif(importlib.util.find_spec("dpdata") is None, reason="needs dpdata")
def test_deepmd_sets_through_dpdata(tmp_path):
    frames = [f for f in read(SHIPPED, ":") if len(f) == 16][:5]
    deepmd_system(tmp_path / "nh3", frames)
    found = read_files([tmp_path / "nh3"], Reading())
    for old, new in zip(frames, found, strict=True):
        order = np.argsort(new.numbers, kind="stable"), np.argsort(old.numbers, kind="stable")
        assert np.abs(new.get_forces()[order[0]] - old.get_forces()[order[1]]).max() < 1e-9
        assert new.get_potential_energy() == pytest.approx(old.get_potential_energy(), abs=1e-9)
        assert np.abs(new.get_stress() - old.get_stress()).max() < 1e-12
    deepmd_system(tmp_path / "nameless", frames, names=False)
    with pytest.raises(DataError, match="which elements its 2 types are"):
        read_files([tmp_path / "nameless"], Reading())
    named = read_files([tmp_path / "nameless"], Reading(elements=("N", "H")))
    assert named[0].get_chemical_formula() == found[0].get_chemical_formula()


def test_what_is_not_there_or_unknown_is_said(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        read_files([tmp_path / "none"], Reading())
    (tmp_path / "x.txt").write_text("hello\n")
    with pytest.raises(DataError, match="no format"):
        read_files([tmp_path / "x.txt"], Reading())
    with pytest.raises(InputError, match="not a known format"):
        read_files([tmp_path / "x.txt"], Reading(form="gaussian"))
    with pytest.raises(InputError, match="not an output of CP2K"):
        read_files([SHIPPED], Reading(wannier="{stem}-wan.xyz"))
