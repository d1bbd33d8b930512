"""How long simulations with a model stay physical, against the number of atoms: fidelity scaling."""
