"""The Wannier read-out: true vectors, exact zeros, and an Allegro that it does not disturb."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper
from nequip.utils.global_state import set_global_state
from scipy.spatial.transform import Rotation

from nnqmd_server.networks.allegro_wannier import AllegroWannier
from nnqmd_server.networks.keys import WANNIER_CENTROID_KEY

CUTOFF = 4.0
ALLEGRO = {
    "seed": 3,
    "model_dtype": "float64",
    "type_names": ["N", "H"],
    "r_max": CUTOFF,
    "l_max": 1,
    "radial_chemical_embed": {
        "_target_": "allegro.nn.TwoBodyBesselScalarEmbed",
        "num_bessels": 4,
        "bessel_trainable": False,
        "polynomial_cutoff_p": 6,
    },
    "num_layers": 1,
    "num_scalar_features": 8,
    "num_tensor_features": 4,
    "scalar_embed_mlp_hidden_layers_width": 8,
    "allegro_mlp_hidden_layers_width": 8,
    "readout_mlp_hidden_layers_width": 8,
    "avg_num_neighbors": 20.0,
    "per_type_energy_shifts": -80.0,
    "per_type_energy_scales": 2.0,
}
WANNIER = {"carriers": {"N": 8}, "ion_charges": {"N": 5, "H": 1}, "wannier_hidden_width": 8}


def build(**changes):
    set_global_state()
    return AllegroWannier(**(ALLEGRO | WANNIER | changes)).eval()


def ammonia(seed=0, molecules=3):
    random = np.random.default_rng(seed)
    shape = np.array([[0, 0, 0], [0.94, 0, 0.38], [-0.47, 0.81, 0.38], [-0.47, -0.81, 0.38]])
    places = np.array([[1, 1, 1], [3.8, 1.5, 3.2], [1.2, 3.9, 3.5], [4.0, 4.1, 0.9]])[:molecules]
    positions = np.concatenate(
        [shape @ Rotation.random(random_state=seed + k).as_matrix().T + p for k, p in enumerate(places)]
    )
    positions += random.normal(scale=0.05, size=positions.shape)
    cell = np.diag([5.3, 5.5, 5.7]) + random.normal(scale=0.1, size=(3, 3))
    return Atoms("NHHH" * molecules, positions, cell=cell, pbc=True)


def evaluate(model, atoms):
    data = ChemicalSpeciesToAtomTypeMapper(["N", "H"])(from_ase(atoms))
    return model(compute_neighborlist_(data, CUTOFF))


@pytest.mark.parametrize("mirror", [1, -1])
@pytest.mark.parametrize("seed", range(3))
def test_centroids_turn_and_invert_with_the_structure(seed, mirror):
    model, atoms = build(), ammonia(seed)
    turn = mirror * Rotation.random(random_state=seed + 20).as_matrix()
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn.T)
    turned.positions = atoms.positions @ turn.T
    here, there = evaluate(model, atoms), evaluate(model, turned)
    centroids = here[WANNIER_CENTROID_KEY].detach().numpy()
    assert np.linalg.norm(centroids[::4], axis=1).min() > 1e-3  # there is something to turn
    np.testing.assert_allclose(there[WANNIER_CENTROID_KEY].detach(), centroids @ turn.T, atol=1e-10, rtol=0)


def test_atoms_that_carry_nothing_get_exact_zeros():
    centroids = evaluate(build(), ammonia())[WANNIER_CENTROID_KEY]
    hydrogen = np.arange(12) % 4 != 0
    assert centroids.shape == (12, 3)
    assert (centroids[hydrogen] == 0).all()
    assert (centroids[~hydrogen] != 0).all()


@pytest.mark.parametrize("carriers", [{"N": 8}, {"N": 2, "H": 2}])
def test_centroids_are_permuted_with_the_atoms(carriers):
    model, atoms = build(carriers=carriers), ammonia()
    order = np.random.default_rng(4).permutation(len(atoms))
    here = evaluate(model, atoms)[WANNIER_CENTROID_KEY].detach().numpy()
    there = evaluate(model, atoms[order])[WANNIER_CENTROID_KEY].detach().numpy()
    assert np.abs(here).max() > 1e-3
    np.testing.assert_allclose(there, here[order], atol=1e-10, rtol=0)


def test_other_carriers_move_the_centroid():
    centroids = evaluate(build(carriers={"H": 2}), ammonia())[WANNIER_CENTROID_KEY]
    assert (centroids[::4] == 0).all()
    assert (centroids[1::4] != 0).all()


def test_energy_forces_and_stress_are_those_of_plain_allegro():
    from allegro.model import AllegroModel

    atoms, ours = ammonia(), build()
    plain = AllegroModel(**ALLEGRO).eval()
    for key in (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY, AtomicDataDict.STRESS_KEY):
        torch.testing.assert_close(
            evaluate(ours, atoms)[key], evaluate(plain, atoms)[key], atol=1e-12, rtol=0
        )


def test_centroid_is_smooth_where_a_neighbour_leaves_the_cutoff():
    model = build()
    values = []
    for distance in (CUTOFF - 1e-3, CUTOFF + 1e-3):
        atoms = Atoms(
            "NHHN", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, distance]], cell=[20, 20, 20], pbc=True
        )
        values.append(evaluate(model, atoms)[WANNIER_CENTROID_KEY][0].detach().numpy())
    np.testing.assert_allclose(*values, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"carriers": {"C": 4}}, {"carriers": {}}, {"ion_charges": {"N": 5}}])
def test_unknown_types_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        build(**wrong)


def test_nequip_finds_the_extension_by_itself():
    code = (
        "import nequip, sys; from nequip.scripts._compile_utils import COMPILE_TARGET_DICT as t; "
        "assert 'wannier_centroid' in t['nnqmd_batch']['output']; "
        "assert not [m for m in sys.modules if m.startswith('nnqmd_server') and 'networks' not in m "
        "and m != 'nnqmd_server'], 'the entry point must be light'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
