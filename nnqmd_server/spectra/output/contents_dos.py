"""What a density of states consists of, as a `Result`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnqmd_server.spectra.cross_sections import Overrides, cross_section_of
from nnqmd_server.spectra.deconvolution import Deconvolution
from nnqmd_server.spectra.output.contents_ins import (
    DENSITY,
    density_curves,
    element_constants,
    run_settings,
    titled,
)
from nnqmd_server.spectra.output.contents_instrument import identifier
from nnqmd_server.spectra.output.labelled import Constant, Labelled, Quantity, Result, Table
from nnqmd_server.spectra.vibrations import Vibrations, generalised_density
from nnqmd_server.units import EV_PER_INVCM, HBAR, MEV_PER_INVCM

Array = np.ndarray


def dos_result(
    vibrations: Vibrations,
    overrides: Overrides | None = None,
    highest: float = 4000.0,
    notes: Sequence[str] = (),
    name: str = "",
    sharpened: Sequence[Deconvolution] | None = None,
) -> Result:
    """Densities of states: by element and group, of all atoms, and weighted as neutrons see them.

    Parameters
    ----------
    vibrations : Vibrations
        From `vibrations.densities_of_states` or phonon modes.
    overrides : mapping, optional
        Label or group -> isotope or total cross-section [barn].
    highest : float
        Last energy [cm^-1].
    notes : sequence of str
        Warnings, and what the reader should know.
    name : str
        What was simulated; begins the title.
    sharpened : sequence of Deconvolution, optional
        The density of every element without the thermostat of the centroid [1/eV].
    """
    shown = vibrations.energies <= highest * EV_PER_INVCM
    energy = vibrations.energies[shown] / EV_PER_INVCM
    curves = density_curves(vibrations, shown)
    barns = [cross_section_of(e.symbol, e.group, overrides).total for e in vibrations.elements]
    labels = [identifier(e.label) for e in vibrations.elements]
    data = Labelled(
        "dos",
        "vibrational densities of states",
        (Quantity("energy", energy, "1/cm", "energy"),),
        (
            _all_atoms(vibrations, curves, labels),
            _generalised(vibrations, overrides, shown, labels),
            *curves,
        ),
        (Quantity("energy_meV", energy * MEV_PER_INVCM, "meV", "energy", formula="energy * meV_per_invcm"),),
    )
    constants = {
        "T": Constant(vibrations.temperature, "K", "temperature"),
        "meV_per_invcm": Constant(MEV_PER_INVCM, "meV*cm", "1 cm^-1 in meV"),
    }
    for element, barn in zip(vibrations.elements, barns, strict=True):
        constants |= element_constants(element, barn)
    return Result(
        "dos",
        titled(name, f"vibrational density of states, {vibrations.temperature:g} K"),
        (data,) if sharpened is None else (data, _sharpened(sharpened, vibrations)),
        constants,
        (
            *(() if vibrations.modes else DENSITY),
            "generalised: G(E) = Sum_i (sigma_i/M_i) f_i(E) / Sum_i (sigma_i/M_i), sigma_i: total bound",
            "  cross-sections, which is what neutrons see of f in one-phonon scattering at small Q",
            *(
                ()
                if sharpened is None
                else (
                    "deconvolved: f(w) = Sum K(w,w0) f_free(w0), K: an oscillator under the thermostat",
                    "  of the centroid; by ISRA (Rossi, Kapil, Ceriotti, J. Chem. Phys. 148, 102301 (2018))",
                )
            ),
            "errors: standard error of the mean over blocks; in vdos and gdos the kinds of atoms count as",
            "  independent",
        ),
        run_settings(vibrations),
        (_elements(vibrations, barns),),
        tuple(notes),
    )


def _sharpened(found: Sequence[Deconvolution], vibrations: Vibrations) -> Labelled:
    curves = []
    for element, d in zip(vibrations.elements, found, strict=True):
        name = identifier(element.label)
        agreement = f"step {d.chosen}" + ("" if d.chi2 is None else f", chi^2 per point {d.chi2:.2g}")
        curves += [
            Quantity(
                f"free_{name}",
                1e-3 * d.spectrum,
                "1/meV",
                f"{element.label}, free, {agreement}",
            ),
            Quantity(
                f"fitted_{name}",
                1e-3 * d.fitted,
                "1/meV",
                f"{element.label}, with thermostat put back",
            ),
        ]
    energy = found[0].omega * HBAR / EV_PER_INVCM
    return Labelled(
        "deconvolved",
        "densities of states without the thermostat of the centroid",
        (Quantity("energy_free", energy, "1/cm", "energy"),),
        tuple(curves),
    )


def _all_atoms(vibrations: Vibrations, curves: Sequence[Quantity], labels: Sequence[str]) -> Quantity:
    weights = [e.count / vibrations.n_atoms for e in vibrations.elements]
    error = None
    if all(c.error is not None for c in curves):
        error = np.sqrt(sum((w * c.error) ** 2 for w, c in zip(weights, curves, strict=True)))
    return Quantity(
        "vdos",
        sum(w * c.values for w, c in zip(weights, curves, strict=True)),
        "1/meV",
        "all atoms, mean, integral one",
        error,
        f"({' + '.join(f'n_{n}*vdos_{n}' for n in labels)})/({' + '.join(f'n_{n}' for n in labels)})",
    )


def _generalised(
    vibrations: Vibrations, overrides: Overrides | None, shown: Array, labels: Sequence[str]
) -> Quantity:
    density, error = generalised_density(vibrations, overrides=overrides)
    weights = [f"n_{n}*sigma_{n}/M_{n}" for n in labels]
    return Quantity(
        "gdos",
        1e-3 * density[shown],
        "1/meV",
        "generalised: weighted with sigma/M, integral one",
        None if error is None else 1e-3 * error[shown],
        f"({' + '.join(f'{w}*vdos_{n}' for w, n in zip(weights, labels, strict=True))})"
        f"/({' + '.join(weights)})",
    )


def _elements(vibrations: Vibrations, barns: Sequence[float]) -> Table:
    return Table(
        "elements",
        ("element", "atoms", "M (amu)", "sigma (barn)", "effective T (K)", "diffusion (A^2/ps)"),
        tuple(
            (
                e.label,
                f"{e.count}",
                f"{e.mass:.5f}",
                f"{barn:.5g}",
                f"{e.kinetic_ratio * vibrations.temperature:.1f}",
                f"{1e3 * e.diffusion:.4g}",
            )
            for e, barn in zip(vibrations.elements, barns, strict=True)
        ),
    )
