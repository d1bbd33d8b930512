"""Trajectories of known spectrum, and i-PI files of them, for the tests of spectra/."""

import numpy as np

from nnqmd_server.spectra.trajectory import Velocities
from nnqmd_server.units import AMU_A2_PER_FS2, ATOMIC_TIME, BOHR, HBAR, KB

H = 1.00794  # amu, i-PI's value


def harmonic_velocities(energies, mass, temperature, n_frames, interval, seed=0):
    """Centroid velocities of independent 3D oscillators, every direction with <v^2> = kT/M.

    The Kubo-transformed VACF of a harmonic oscillator is (kT/M) cos(wt) at any temperature.
    ``energies`` [eV] has shape (n_atoms,) or (n_atoms, 3).
    """
    energies = np.broadcast_to(
        np.asarray(energies, dtype=float).reshape(len(energies), -1), (len(energies), 3)
    )
    phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, energies.shape)
    speed = np.sqrt(2 * KB * temperature / (mass * AMU_A2_PER_FS2))
    times = interval * np.arange(n_frames)
    return speed * np.cos(energies / HBAR * times[:, None, None] + phases)


def trajectory(velocities, interval, symbol="H"):
    n_frames, n_atoms, _ = velocities.shape
    return Velocities((symbol,) * n_atoms, velocities, np.arange(n_frames), interval, "v_centroid")


def write_ipi_xyz(path, velocities, stride, symbols):
    """Write velocities [A/fs] as i-PI 3.3 writes v_centroid."""
    atomic = velocities * ATOMIC_TIME / BOHR
    n_atoms = velocities.shape[1]
    with path.open("w") as file:
        for k, frame in enumerate(atomic):
            file.write(
                f"{n_atoms}\n# CELL(abcABC):   18.89726    18.89726    18.89726    90.00000    90.00000    "
            )
            file.write(f"90.00000  Step:  {k * stride:10d}  Bead:       0 v_centroid{{atomic_unit}}  ")
            file.write("cell{atomic_unit}\n")
            file.writelines(
                f"{s:>8s} {row[0]:12.5e} {row[1]:12.5e} {row[2]:12.5e}\n"
                for s, row in zip(symbols, frame, strict=True)
            )
