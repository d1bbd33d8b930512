import numpy as np
import pytest
from conftest import crystal

from nnqmd_server.structures import Results, from_ase, join, replicas


def test_runs_of_a_ragged_batch_are_the_structures_themselves():
    frames = [crystal(seed=1), crystal(seed=2, repeat=(2, 1, 1)), crystal(seed=3)]
    batch = from_ase(frames)
    assert batch.offsets.tolist() == [0, 16, 48, 64]
    middle = batch[1:3]
    assert len(middle) == 2
    assert middle.offsets.tolist() == [0, 32, 48]
    assert np.array_equal(middle.positions[:32], frames[1].positions)
    assert np.array_equal(middle.cells[1], frames[2].cell.array)
    assert np.shares_memory(middle.positions, batch.positions)
    assert batch.volumes == pytest.approx([f.get_volume() for f in frames], rel=1e-12)


def test_replicas_keep_bead_order():
    positions = np.arange(2 * 3 * 3, dtype=float).reshape(2, 3, 3)
    beads = replicas(np.array([7, 1, 1]), positions, np.stack([np.eye(3), 2 * np.eye(3)]))
    assert beads.numbers.tolist() == [7, 1, 1, 7, 1, 1]
    assert np.array_equal(beads.positions[beads.atoms_of(1)], positions[1])


def test_results_are_joined_in_the_order_given():
    def part(value, atoms):
        return Results(
            np.array([value]),
            np.full((atoms, 3), value),
            np.full((1, 3, 3), value),
            {"dipole": np.full((1, 3), value)},
            {"wannier_centroid": np.full((atoms, 3), value)},
        )

    whole = join([part(1.0, 2), part(2.0, 3)])
    assert whole.energy.tolist() == [1.0, 2.0]
    assert whole.forces[:, 0].tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert whole.properties["dipole"].shape == (2, 3)
    assert whole.atom_properties["wannier_centroid"].shape == (5, 3)
