"""Runs phonopy on force sets and writes mesh.hdf5 and phonopy.yaml; in phonopy's own environment.

python -m venv phonopy && phonopy/bin/pip install phonopy h5py
phonopy/bin/python benchmarks/peer_phonopy.py PHONOPY_PARAMS.yaml FORCE_SETS FOLDER NX NY NZ
"""

import os
import sys

import phonopy

parameters, forces, folder, *mesh = sys.argv[1:]
# the cell that the force sets were made for, not a smaller one
phonon = phonopy.load(parameters, force_sets_filename=forces, primitive_matrix="P", log_level=0)
# without symmetry, so that the tensors of single atoms come out; q and -q are still one
phonon.run_mesh([int(n) for n in mesh], with_eigenvectors=True, is_mesh_symmetry=False, is_time_reversal=True)
os.chdir(folder)
phonon.write_hdf5_mesh()
phonon.save("phonopy.yaml", settings={"force_sets": False, "force_constants": False})
print(len(phonon.mesh.frequencies), "q-points")
