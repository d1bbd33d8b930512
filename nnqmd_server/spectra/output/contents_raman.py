"""What a Raman spectrum consists of, as a `Result`."""

from __future__ import annotations

from collections.abc import Sequence

from nnqmd_server.spectra.output.contents_ins import titled
from nnqmd_server.spectra.output.labelled import Constant, Labelled, Quantity, Result
from nnqmd_server.spectra.raman import RamanSpectrum
from nnqmd_server.units import MEV_PER_INVCM

INTENSITY = "angstrom^6*cm"


def raman_result(spectrum: RamanSpectrum, notes: Sequence[str] = (), name: str = "") -> Result:
    """A Raman spectrum as a `Result`.

    Parameters
    ----------
    spectrum : RamanSpectrum
        From `raman.raman_spectrum`.
    notes : sequence of str
        Warnings, and what the reader should know.
    name : str
        What was simulated; begins the title.
    """
    s = spectrum
    data = Labelled(
        "raman",
        "Raman spectrum, Stokes side",
        (Quantity("shift", s.wavenumber, "1/cm", "Raman shift"),),
        (
            Quantity(
                "VV",
                s.parallel,
                INTENSITY,
                "polarized, VV",
                s.parallel_error,
                "isotropic + 4/30*anisotropic",
            ),
            Quantity(
                "VH", s.perpendicular, INTENSITY, "depolarized, VH", s.perpendicular_error, "anisotropic/10"
            ),
            Quantity("isotropic", s.isotropic, INTENSITY, "isotropic part", s.isotropic_error),
            Quantity("anisotropic", s.anisotropic, INTENSITY, "anisotropic part", s.anisotropic_error),
        ),
        (
            Quantity(
                "energy_meV", s.wavenumber * MEV_PER_INVCM, "meV", "energy", formula="shift * meV_per_invcm"
            ),
        ),
    )
    return Result(
        "raman",
        titled(name, f"Raman scattering, {s.temperature:g} K"),
        (data,),
        {
            "meV_per_invcm": Constant(MEV_PER_INVCM, "meV*cm", "1 cm^-1 in meV"),
            "T": Constant(s.temperature, "K", "temperature"),
        },
        (
            "isotropic(nu) = q(w) c Int_-inf^inf dt exp(-iwt) <abar(0) abar(t)>, abar = Tr a/3;",
            "anisotropic(nu) = q(w) c Int_-inf^inf dt exp(-iwt) <Tr b(0).b(t)>, b = a - abar;",
            "  a: polarizability of the cell, bead average, mean taken off; q: quantum correction (Stokes);",
            "VV = isotropic + (4/30) anisotropic, VH = (1/10) anisotropic (Long, The Raman Effect, 2002)",
            "no factor for the laser"
            if s.laser is None
            else f"times (1 - nu/nu_L)^4, laser nu_L = {s.laser:g} cm^-1",
        ),
        _settings(s),
        (),
        tuple(notes),
    )


def _settings(s: RamanSpectrum) -> dict[str, str]:
    runs = f"{s.n_runs} runs" if s.n_runs > 1 else "1 run"
    beads = f"{s.n_beads} beads" if s.n_beads > 1 else "1 bead"
    return {
        "in short": f"{runs}, {beads}, {s.duration / 1000:.3g} ps of dynamics, a sharp line is "
        f"{s.resolution:.3g} cm^-1 wide (FWHM)",
        "temperature": f"{s.temperature:g} K",
        "trajectory": f"{runs}, {s.n_frames} frames, one every {s.interval:g} fs: {s.duration:g} fs",
        "window": f"{s.window}, {s.lag:g} fs: a sharp line is {s.resolution:.3g} cm^-1 wide (FWHM)",
        "quantum correction": s.quantum,
        "blocks behind the standard errors": f"{s.n_blocks}"
        + ("" if s.n_blocks > 1 else " (none: too short)"),
    }
