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
