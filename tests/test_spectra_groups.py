"""Densities of states by element and by group, several runs, generalised density, bead spread."""

import numpy as np
import pytest
from spectra_cases import H, harmonic_velocities, trajectory, write_ipi_xyz

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.debye_waller import bead_spread, debye_waller_check
from nnqmd_server.spectra.diffusion import looks_liquid
from nnqmd_server.spectra.inelastic import neutron_spectrum
from nnqmd_server.spectra.neutron import recoil_constant
from nnqmd_server.spectra.series import Velocities
from nnqmd_server.spectra.trajectory import open_beads, open_trajectory
from nnqmd_server.spectra.vibrations import densities_of_states, generalised_density
from nnqmd_server.units import BOHR, KB

LINES = np.array([0.03, 0.03, 0.08, 0.08, 0.08, 0.02])
SYMBOLS = ("H", "H", "H", "H", "H", "N")


def run(seed, n_frames=4000):
    velocities = np.concatenate(
        [
            harmonic_velocities(LINES[:5], H, 100.0, n_frames, 2.0, seed),
            harmonic_velocities(LINES[5:], 14.00674, 100.0, n_frames, 2.0, seed + 1),
        ],
        axis=1,
    )
    return Velocities(SYMBOLS, velocities, np.arange(n_frames), 2.0, "v_centroid")


def peak(vibrations, element):
    return vibrations.energies[np.argmax(element.density)]


def test_groups_have_densities_of_their_own():
    v = densities_of_states(run(1), 100.0, 2000.0, groups={"soft": [0, 1, 5]})
    assert [e.label for e in v.elements] == ["H (soft)", "N (soft)", "H"]
    assert [list(e.atoms) for e in v.elements] == [[0, 1], [5], [2, 3, 4]]
    for element, energy in zip(v.elements, (0.03, 0.02, 0.08), strict=True):
        assert peak(v, element) == pytest.approx(energy, abs=v.step)
    whole = densities_of_states(run(1), 100.0, 2000.0)
    parts = sum(e.count * e.density * e.kinetic_ratio for e in v.elements if e.symbol == "H")
    (both,) = (e for e in whole.elements if e.symbol == "H")
    assert parts / 5 == pytest.approx(both.density * both.kinetic_ratio, abs=2e-2 * both.density.max())
    spectrum = neutron_spectrum(v, highest=1200.0, overrides={"soft": "D"})
    assert [p.label for p in spectrum.elements] == ["H (soft)", "N (soft)", "H"]
    assert [round(p.cross_section, 1) for p in spectrum.elements] == [7.6, 7.6, 82.0]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"a": [0, 1], "b": [1, 2]}, "in a group already"),
        ({"a": [0, 9]}, "atom 9"),
        ({"a": []}, "empty"),
        ({"H": [0]}, "like an element"),
        ({"a": [-1]}, "names atom"),
    ],
)
def test_unusable_groups(groups, words):
    with pytest.raises(DataError, match=words):
        densities_of_states(run(1, 800), 100.0, 400.0, groups=groups)


def test_several_runs_are_averaged_and_streamed(tmp_path):
    runs = [run(seed, 2000) for seed in (1, 11, 21)]
    paths = [tmp_path / f"run{k}.xyz" for k in range(3)]
    for path, r in zip(paths, runs, strict=True):
        write_ipi_xyz(path, r.velocities, 4, SYMBOLS)
    streams = [open_trajectory(p, timestep=0.5) for p in paths]
    together = densities_of_states(streams, 100.0, 1000.0)
    assert together.n_runs == 3
    assert together.n_frames == 6000
    single = [densities_of_states(r, 100.0, 1000.0) for r in runs]
    for k, element in enumerate(together.elements):
        mean = np.mean([s.elements[k].density * s.elements[k].kinetic_ratio for s in single], axis=0)
        found = element.density * element.kinetic_ratio
        assert found == pytest.approx(mean, abs=2e-2 * mean.max())
        assert element.error is not None
    assert not looks_liquid(streams[0])[0]


def test_generalised_density_weighs_with_cross_section_over_mass():
    v = densities_of_states(run(3), 100.0, 2000.0)
    found, error = generalised_density(v)
    h, n = (5 * 82.02 / H, 11.51 / 14.00674)
    wanted = (h * v.elements[0].density + n * v.elements[1].density) / (h + n)
    assert found == pytest.approx(wanted, rel=1e-3)
    assert error is not None
    step = v.step
    assert (found.sum() - 0.5 * found[0]) * step == pytest.approx(1, abs=1e-3)
    coherent, _ = generalised_density(v, "coherent", overrides={"H": "D"})
    h, n = (5 * 5.592 / H, 11.01 / 14.00674)
    wanted = (h * v.elements[0].density + n * v.elements[1].density) / (h + n)
    assert coherent == pytest.approx(wanted, rel=2e-3)
    with pytest.raises(DataError, match="Choose total"):
        generalised_density(v, "magnetic")


def write_beads(folder, positions):
    """i-PI's bead files, positions (frames, beads, atoms, 3) in Angstrom."""
    for bead in range(positions.shape[1]):
        with (folder / f"run.pos_{bead:02d}.xyz").open("w") as file:
            for k, frame in enumerate(positions[:, bead] / BOHR):
                file.write(f"{len(frame)}\n# CELL(abcABC): 200 200 200 90 90 90 Step: {k * 20} Bead: {bead} ")
                file.write("positions{atomic_unit} cell{atomic_unit}\n")
                file.writelines(f"H {x:.10e} {y:.10e} {z:.10e}\n" for x, y, z in frame)
    return folder / "run.pos_00.xyz"


def test_bead_spread_against_the_density(tmp_path):
    """Beads drawn from the exact quantum distribution of the oscillators that the velocities come from."""
    rng = np.random.default_rng(2)
    energies = np.full(16, 0.06)
    u2 = recoil_constant(H) / 0.06 / np.tanh(0.06 / (2 * KB * 100))
    velocities = harmonic_velocities(energies, H, 100.0, 4000, 2.0)
    vibrations = densities_of_states(trajectory(velocities, 2.0), 100.0, 2000.0)
    spectrum = neutron_spectrum(vibrations, highest=900.0)
    places = 10 + 5 * rng.random(size=(16, 3))
    beads = places + np.sqrt(u2) * rng.normal(size=(150, 4, 16, 3))
    path = write_beads(tmp_path, beads)
    opened = open_beads(path, timestep=0.5)
    spread, n_frames = bead_spread(opened)
    assert n_frames == 150
    flat = beads.reshape(600, 16, 3)
    assert spread == pytest.approx(((flat - flat.mean(axis=0)) ** 2).sum(axis=-1).mean(axis=0) / 3, rel=1e-6)
    good = debye_waller_check(spectrum, opened)
    assert good.difference == pytest.approx(0, abs=0.02)
    assert good.warnings == ()
    write_beads(tmp_path, places + 1.3 * (beads - places))
    bad = debye_waller_check(spectrum, open_beads(path, timestep=0.5))
    assert bad.difference == pytest.approx(1 / 1.69 - 1, abs=0.02)
    assert "-4" in bad.warnings[0] and "from the beads" in bad.warnings[0]
    liquid = neutron_spectrum(vibrations, solid=False, highest=900.0)
    with pytest.raises(DataError, match="no Debye-Waller"):
        debye_waller_check(liquid, opened)


def test_velocities_have_no_bead_spread(tmp_path):
    write_ipi_xyz(tmp_path / "vc.xyz", run(1, 100).velocities, 4, SYMBOLS)
    with pytest.raises(DataError, match="not positions"):
        bead_spread(open_trajectory(tmp_path / "vc.xyz", timestep=0.5))
