"""What computes forces: one small file per kind of potential."""
