"""What an infrared spectrum consists of, as a `Result`."""

from __future__ import annotations

from collections.abc import Sequence

from nnqmd_server.spectra.dielectric import DielectricConstant
from nnqmd_server.spectra.infrared import InfraredSpectrum
from nnqmd_server.spectra.output.contents_ins import titled
from nnqmd_server.spectra.output.labelled import Constant, Labelled, Quantity, Result, Table
from nnqmd_server.units import EV_PER_INVCM, HBAR, MEV_PER_INVCM

ACF = "e^2*angstrom^2/fs^2"


def ir_result(
    spectrum: InfraredSpectrum,
    notes: Sequence[str] = (),
    dielectric: DielectricConstant | None = None,
    name: str = "",
) -> Result:
    """An infrared spectrum as a `Result`.

    Parameters
    ----------
    spectrum : InfraredSpectrum
        From `infrared.infrared_spectrum`.
    notes : sequence of str
        Warnings, and what the reader should know.
    dielectric : DielectricConstant, optional
        Static dielectric constant of the same runs.
    name : str
        What was simulated; begins the title.
    """
    tables = (_sum_rule(spectrum),) + (() if dielectric is None else (_static(dielectric),))
    return Result(
        "ir",
        titled(name, f"infrared absorption, {spectrum.temperature:g} K"),
        (_spectrum(spectrum), _correlation(spectrum)),
        _constants(spectrum),
        _formulas(spectrum),
        _settings(spectrum),
        tables,
        (*notes, *(dielectric.warnings if dielectric is not None else ())),
    )


def _spectrum(s: InfraredSpectrum) -> Labelled:
    curves = [Quantity("n_alpha", s.absorption, "1/cm", "n(w)alpha(w) from the current", s.error)]
    if s.from_dipole is not None:
        curves.append(
            Quantity("n_alpha_dipole", s.from_dipole, "1/cm", "n(w)alpha(w) from the dipole (check)")
        )
    return Labelled(
        "ir",
        "infrared absorption",
        (Quantity("wavenumber", s.wavenumber, "1/cm", "wavenumber"),),
        tuple(curves),
        (
            Quantity(
                "energy_meV",
                s.wavenumber * MEV_PER_INVCM,
                "meV",
                "photon energy",
                formula="wavenumber * meV_per_invcm",
            ),
        ),
    )


def _correlation(s: InfraredSpectrum) -> Labelled:
    return Labelled(
        "correlation",
        "autocorrelation of the current of the cell",
        (Quantity("time", s.lags, "fs", "time"),),
        (
            Quantity("current_acf", s.correlation, ACF, "<J(0).J(t)>, without window"),
            Quantity("window", s.window_values, "", "window w(t)"),
        ),
    )


def _constants(s: InfraredSpectrum) -> dict[str, Constant]:
    return {
        "meV_per_invcm": Constant(MEV_PER_INVCM, "meV*cm", "1 cm^-1 in meV"),
        "T": Constant(s.temperature, "K", "temperature"),
        "V": Constant(s.volume, "angstrom^3", "mean volume of the cell"),
        "dt": Constant(s.interval, "fs", "time between frames"),
        "w_per_invcm": Constant(EV_PER_INVCM / HBAR, "rad*cm/fs", "angular frequency of 1 cm^-1, 2 pi c"),
        "A": Constant(
            s.prefactor, "fs/(e^2*angstrom^2*cm)", "1/(6 eps0 c V kB T) for <J.J> in e^2 angstrom^2/fs^2"
        ),
    }


def _formulas(s: InfraredSpectrum) -> tuple[str, ...]:
    kind = (
        f"bead average over {s.n_beads} beads (Kubo-transformed)"
        if s.n_beads > 1
        else "classical or centroid"
    )
    lines = [
        "n(w)alpha(w) = 1/(6 eps0 c V kB T) Int_-inf^inf dt exp(-iwt) <J(0).J(t)>, J = dM/dt, in cm^-1",
        "  (n: refractive index, alpha: absorption coefficient to base e; SI units, 1/m -> 1/cm);",
        "  in numbers, from ir-correlation.txt, with w = wavenumber * w_per_invcm:",
        "  n_alpha = 2 A dt {Sum_k window_k current_acf_k cos(w time_k) - window_0 current_acf_0 / 2}"
        + (" / attenuation" if s.from_dipole is not None else ""),
    ]
    if s.from_dipole is not None:
        lines.append(
            "  attenuation = [sin(w dt/2)/(w dt/2)]^2, since J is a difference of neighbouring dipoles"
        )
        lines.append("dipole route (check): w^2/(6 eps0 c V kB T) Int dt exp(-iwt) <M(0).M(t)>")
    lines.append("  small negative values are side lobes of the window or noise, and are kept")
    lines.append(f"J: {s.how}; {kind}")
    if s.quantum == "harmonic":
        lines.append(
            "no further quantum factor: <J.J> is the Kubo-transformed function (harmonic correction of a"
        )
        lines.append("  classical one); Ramirez, Lopez-Ciudad, Kumar, Marx, J. Chem. Phys. 121, 3973 (2004)")
    else:
        lines.append(
            f"times q(w) (1 - exp(-x))/x, x = hbar w/(kB T), with the quantum correction q '{s.quantum}'"
        )
    return tuple(lines)


def _settings(s: InfraredSpectrum) -> dict[str, str]:
    runs = f"{s.n_runs} runs" if s.n_runs > 1 else "1 run"
    beads = f"{s.n_beads} beads" if s.n_beads > 1 else "1 bead"
    return {
        "in short": f"{runs}, {beads}, {s.duration / 1000:.3g} ps of dynamics, a sharp line is "
        f"{s.resolution:.3g} cm^-1 wide (FWHM)",
        "temperature": f"{s.temperature:g} K",
        "trajectory": f"{runs}, {s.n_frames} frames, one every {s.interval:g} fs: {s.duration:g} fs",
        "volume": f"{s.volume:.4f} A^3 (mean)",
        "window": f"{s.window}, {s.lag:g} fs: a sharp line is {s.resolution:.3g} cm^-1 wide (FWHM)",
        "quantum correction": s.quantum,
        "blocks behind the standard errors": f"{s.n_blocks}"
        + ("" if s.n_blocks > 1 else " (none: too short)"),
        "branch jumps removed (e times cell vectors)": f"{s.n_jumps}",
    }


def _sum_rule(s: InfraredSpectrum) -> Table:
    return Table(
        "sum rule",
        ("Int n alpha dnu (cm^-2)", "<J^2>/(12 eps0 c^2 V kB T) (cm^-2)"),
        ((f"{s.measured_sum:.6g}", f"{s.expected_sum:.6g}"),),
    )


def _static(d: DielectricConstant) -> Table:
    return Table(
        "static dielectric constant, eps_inf + (<M^2> - <M>^2)/(3 eps0 V kB T)",
        ("eps", "standard error", "eps_inf put in", "relaxation of M (fs)"),
        (
            (
                f"{d.value:.4g}",
                "none" if d.error is None else f"{d.error:.2g}",
                f"{d.high_frequency:g}",
                f"{d.relaxation:.3g}",
            ),
        ),
    )
