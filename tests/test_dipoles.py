"""Dipoles against the labels of the data set, which were made by another program."""

import numpy as np
import pytest
from ase.io import read
from conftest import ROOT

from nnqmd_server.dipoles import molecular_dipoles, total_dipoles
from nnqmd_server.structures import Structures, from_ase

IONS, CARRIERS = {"N": 5.0, "H": 1.0}, {"N": 8.0}


@pytest.fixture(scope="module")
def frames():
    return read(ROOT / "examples/ammonia/data/ammonia_train.xyz", ":")


def test_dipoles_from_reference_centroids_equal_the_labels(frames):
    centroids = np.concatenate([f.arrays["wannier_centroid"] for f in frames])
    totals = total_dipoles(from_ase(frames), centroids, IONS, CARRIERS)
    assert totals == pytest.approx(np.array([f.info["total_dipole"] for f in frames]), abs=2e-6)
    for frame in frames[::10]:
        dipoles, charges = molecular_dipoles(
            frame.numbers, frame.positions, frame.cell.array, frame.arrays["wannier_centroid"], IONS, CARRIERS
        )
        assert dipoles == pytest.approx(frame.arrays["mol_dipole"][frame.numbers == 7], abs=1e-6)
        assert np.abs(charges).max() < 1e-12


def test_the_total_dipole_does_not_depend_on_wrapping_or_origin(frames):
    frame = frames[0]
    centroids = frame.arrays["wannier_centroid"]
    whole = from_ase([frame])
    moved = frame.copy()
    moved.positions += [1.3, -2.7, 11.0]
    wrapped = moved.copy()
    wrapped.wrap()
    assert np.abs(wrapped.positions - moved.positions).max() > 1.0
    expected = total_dipoles(whole, centroids, IONS, CARRIERS)
    for other in (moved, wrapped):
        assert total_dipoles(from_ase([other]), centroids, IONS, CARRIERS) == pytest.approx(
            expected, abs=1e-10
        )


def test_a_proton_that_moves_over_does_not_make_the_dipole_jump():
    """Where a proton passes the middle between two N, the molecule it counts to changes; M must not."""
    cell = np.eye(3)[None] * 20.0
    base = np.array(
        [[5.0, 5, 5], [4.5, 5.9, 5], [4.5, 4.1, 5], [8.0, 5, 5], [8.4, 5.9, 5], [8.4, 4.1, 5], [0, 5, 5]]
    )
    numbers = np.array([7, 1, 1, 7, 1, 1, 1])
    totals = []
    for x in (6.5 - 1e-6, 6.5 + 1e-6):
        positions = base.copy()
        positions[6, 0] = x
        one = Structures(numbers, positions, cell, np.array([0, 7]))
        # An NH2- and an NH3: neutral with one more charge at N 8, so the sum is origin-free in its change.
        totals.append(total_dipoles(one, np.zeros((7, 3)), IONS, CARRIERS)[0])
    assert totals[1] == pytest.approx(totals[0], abs=1e-5)


def test_a_large_structure_is_worked_off_in_parts(frames, monkeypatch):
    frame = frames[0]
    words = frame.numbers, frame.positions, frame.cell.array, frame.arrays["wannier_centroid"], IONS, CARRIERS
    whole, charges = molecular_dipoles(*words)
    monkeypatch.setattr("nnqmd_server.dipoles._PAIRS", 7)
    parts, same = molecular_dipoles(*words)
    assert parts == pytest.approx(whole, abs=1e-13)
    assert np.array_equal(same, charges)


ALL_CENTRES = {"N": 2.0, "H": 2.0}


@pytest.fixture(scope="module")
def assigned(frames):
    """The frames with a bond centre on every H and the lone pair on every N."""
    from nnqmd_server.training.centres import assign_centres, read_centres

    file = ROOT / "examples/ammonia/data/ammonia_train_wannier.xyz"
    return assign_centres(frames, read_centres(file), ALL_CENTRES)


def test_the_full_set_of_centres_gives_the_same_dipoles(frames, assigned):
    """Of molecules and cells; the centres come from another file, written with fewer digits."""
    full = np.concatenate([f.arrays["wannier_centroid"] for f in assigned])
    mean = np.concatenate([f.arrays["wannier_centroid"] for f in frames])
    assert np.linalg.norm(full, axis=1).min() > 0.1  # every atom carries something
    one = total_dipoles(from_ase(frames), mean, IONS, CARRIERS)
    assert total_dipoles(from_ase(frames), full, IONS, ALL_CENTRES) == pytest.approx(one, abs=2e-5)
    frame, labels = frames[3], assigned[3].arrays["wannier_centroid"]
    where = frame.numbers, frame.positions, frame.cell.array
    dipoles, charges = molecular_dipoles(*where, labels, IONS, ALL_CENTRES)
    expected, _ = molecular_dipoles(*where, frame.arrays["wannier_centroid"], IONS, CARRIERS)
    assert dipoles == pytest.approx(expected, abs=2e-5)
    assert np.abs(charges).max() < 1e-12


def test_centres_lie_on_their_bonds(assigned):
    """In NH3 the bond centre is nearer to N: from H up to half an Angstrom towards it."""
    for frame in assigned[::10]:
        hydrogens = np.flatnonzero(frame.numbers == 1)
        nitrogens = np.flatnonzero(frame.numbers == 7)
        for h in hydrogens:
            to_n = frame.get_distances(h, nitrogens, mic=True, vector=True)
            to_n = to_n[np.argmin(np.linalg.norm(to_n, axis=1))]
            centre = frame.arrays["wannier_centroid"][h]
            assert 0.2 < np.linalg.norm(centre) < 0.7
            assert centre @ to_n / np.linalg.norm(centre) / np.linalg.norm(to_n) > 0.95


def test_centres_are_assigned_whatever_their_order_and_that_of_the_atoms(frames):
    from nnqmd_server.training.centres import centroids_of, read_centres

    centred = read_centres(ROOT / "examples/ammonia/data/ammonia_train_wannier.xyz")[0]
    real = centred[centred.numbers != 0]
    centres = centred.positions[centred.numbers == 0]
    expected = centroids_of(real, centres, ALL_CENTRES)
    random = np.random.default_rng(1)
    order = random.permutation(len(real))
    found = centroids_of(real[order], random.permutation(centres), ALL_CENTRES)
    assert found == pytest.approx(expected[order], abs=1e-12)


def test_the_total_dipole_of_all_centres_does_not_depend_on_wrapping_or_origin(assigned):
    frame = assigned[0]
    centroids = frame.arrays["wannier_centroid"]
    moved = frame.copy()
    moved.positions += [1.3, -2.7, 11.0]
    wrapped = moved.copy()
    wrapped.wrap()
    expected = total_dipoles(from_ase([frame]), centroids, IONS, ALL_CENTRES)
    for other in (moved, wrapped):
        found = total_dipoles(from_ase([other]), centroids, IONS, ALL_CENTRES)
        assert found == pytest.approx(expected, abs=1e-10)


def test_centres_of_other_frames_are_refused(frames):
    from nnqmd_server.errors import DataError
    from nnqmd_server.training.centres import assign_centres, read_centres

    centred = read_centres(ROOT / "examples/ammonia/data/ammonia_train_wannier.xyz")
    with pytest.raises(DataError, match="62 frames, the file of centres 61"):
        assign_centres(frames, centred[1:], ALL_CENTRES)
    swapped = [centred[1], centred[0], *centred[2:]]
    with pytest.raises(DataError, match=r"Frames 0, 1 .* other atoms"):
        assign_centres(frames, swapped, ALL_CENTRES)
    short = [centred[0][:-1], *centred[1:]]
    with pytest.raises(DataError, match=r"Frame 0 .* number of centres"):
        assign_centres(frames, short, ALL_CENTRES)
