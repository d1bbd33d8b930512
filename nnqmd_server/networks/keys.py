"""Names of the fields that our networks add to nequip's."""

WANNIER_CENTROID_KEY = "wannier_centroid"
"""Centre of an atom's valence electrons relative to the atom [Angstrom], (n_atoms, 3)."""
