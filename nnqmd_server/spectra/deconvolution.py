"""Taking the mark of a thermostat out of a velocity spectrum.

A thermostat on the centroid (or on a classical run) damps and shifts every vibration. For an oscillator of
frequency w0 under a generalised Langevin equation the distorted spectrum K(w, w0) is known, so the observed
spectrum is y(w) = Sum K(w, w0) f(w0) of the undisturbed one, f. It is solved for f >= 0 by ISRA,

    f <- f * (K^T y) / (K^T K f)

(Daube-Witherspoon and Muehllehner, IEEE Trans. Med. Imaging 5, 61 (1986); for thermostats Rossi, Kapil and
Ceriotti, J. Chem. Phys. 148, 102301 (2018)). Each step sharpens f, and in the end the noise. With the
errors of y known, the steps end where K f agrees with y within them (chi^2 of one per point); without, the
history of residual against roughness (the L-curve) shows where to look.

What this does not do: TRPMD's thermostat acts on the internal modes, not on the centroid. In a harmonic
potential the centroid then feels nothing; what broadens TRPMD's lines is anharmonic coupling, which no such
kernel holds.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.linalg import solve_continuous_lyapunov

from nnqmd_server.errors import DataError, InputError
from nnqmd_server.spectra.vibrations import Vibrations
from nnqmd_server.units import ATOMIC_TIME, EV_PER_INVCM, HBAR

Array = np.ndarray


@dataclass(frozen=True)
class Deconvolution:
    """Spectrum without the thermostat.

    Parameters
    ----------
    omega : Array
        Angular frequencies [rad/fs], shape (n,).
    spectrum : Array
        At the chosen step, unit of the spectrum that was given, shape (n,).
    fitted : Array
        ``spectrum`` with the thermostat put back, to lay over the observed one, shape (n,).
    steps : Array
        Steps at which the history was kept, shape (n_kept,).
    history : Array
        Spectra at these steps, shape (n_kept, n).
    residual, roughness : Array
        |K f - y|^2 and |f''|^2 (second difference) at these steps, shape (n_kept,): the L-curve.
    chosen : int
        The step that was chosen.
    chi2 : float or None
        Mean of ((K f - y) / error)^2 there, where errors were given.
    """

    omega: Array
    spectrum: Array
    fitted: Array
    steps: Array
    history: Array
    residual: Array
    roughness: Array
    chosen: int
    chi2: float | None


def thermostat_of(ipi_input: Path) -> tuple[Array, Array]:
    """Drift and covariance of the thermostat of an i-PI input, for one simulation.

    Parameters
    ----------
    ipi_input : Path
        An input with a ``gle``, ``nm_gle`` (its mode 0), ``langevin`` or ``pile_l`` thermostat.

    Returns
    -------
    drift : Array
        A_p [1/fs], shape (n, n); the first row and column belong to the momentum.
    covariance : Array
        C_p / kB T, without unit, shape (n, n).

    Raises
    ------
    InputError
        The input cannot be read, or has another thermostat.
    """
    from ipi.engine import thermostats
    from ipi.inputs.thermostats import InputThermo
    from ipi.utils.io.inputs import io_xml
    from ipi.utils.units import unit_to_internal

    known = "It must be one of gle, nm_gle, langevin, pile_l."
    try:
        root = ET.parse(ipi_input).getroot()
        nodes = [node for node in root.iter("thermostat") if node.get("mode", "").strip()]
        if len(nodes) != 1:
            raise InputError(f"{ipi_input} has {len(nodes)} thermostats.", "Give an input with one of them.")
        field = InputThermo()
        field.parse(io_xml.xml_parse_string(ET.tostring(nodes[0], encoding="unicode")).fields[0][1])
        thermostat = field.fetch()
        ensemble = root.find(".//ensemble/temperature")
        if ensemble is None or not (ensemble.text or "").strip():
            raise InputError(f"{ipi_input} has no temperature.", "Add <ensemble><temperature>.")
        beads = [int(node.get("nbeads", "1")) for node in root.iter() if node.tag in ("initialize", "beads")]
        kT = float(ensemble.text or "") * unit_to_internal("temperature", ensemble.get("units", ""), 1.0)
        kT *= max(beads, default=1)  # i-PI simulates P beads at P times the temperature
    except (OSError, ET.ParseError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{ipi_input} cannot be used ({error}).", f"Correct it. {known}") from error
    if isinstance(thermostat, thermostats.ThermoGLE | thermostats.ThermoNMGLE):
        thermostat.temp = kT
        A, C = np.array(thermostat.A), np.array(thermostat.C) / kT
        if isinstance(thermostat, thermostats.ThermoNMGLE):
            A, C = A[0], C[0]  # the centroid's
    elif isinstance(thermostat, thermostats.ThermoPILE_G):
        raise InputError(
            f"The thermostat of {ipi_input} acts on all velocities together (pile_g).",
            f"It barely changes a spectrum. {known}",
        )
    elif isinstance(thermostat, thermostats.ThermoLangevin | thermostats.ThermoPILE_L):
        A, C = np.array([[1.0 / thermostat.tau]]), np.eye(1)
    else:
        raise InputError(f"The thermostat of {ipi_input} is {nodes[0].get('mode')}.", known)
    return A / ATOMIC_TIME, C


def thermostat_kernel(omega: Array, drift: Array, covariance: Array | None = None) -> Array:
    """Velocity spectra of oscillators under a generalised Langevin equation.

    Parameters
    ----------
    omega : Array
        Evenly spaced angular frequencies from zero [rad/fs], shape (n,).
    drift : Array
        A_p [1/fs], shape (m, m).
    covariance : Array, optional
        C_p / kB T, shape (m, m); one by default, a canonical thermostat.

    Returns
    -------
    Array
        K, shape (n, n): column j is the spectrum of an oscillator at omega[j], whose sum over the rows is
        the part of <v^2> (one for a canonical thermostat) that lies within the grid. An oscillator that
        is damped less than the grid resolves gets the width of two grid points.

    Raises
    ------
    DataError
        An uneven grid, or a drift that does not damp.
    """
    omega = np.asarray(omega, dtype=float)
    step = omega[1] - omega[0]
    if omega[0] != 0 or np.abs(np.diff(omega) / step - 1).max() > 1e-6:
        raise DataError("The frequencies are not even from zero on.", "Use the grid of one transform.")
    A = np.atleast_2d(np.asarray(drift, dtype=float)).copy()
    C = np.eye(len(A)) if covariance is None else np.atleast_2d(np.asarray(covariance, dtype=float))
    noise = A @ C + C @ A.T
    if not (np.linalg.eigvals(A).real > 0).all():
        raise DataError("The drift matrix of the thermostat does not damp.", "Check its signs and its unit.")
    kernel = np.empty((len(omega), len(omega)))
    grid = np.maximum(omega, 0.1 * step)  # at zero an oscillator that is nearly free, seen at its own line
    for j, w0 in enumerate(grid):
        kernel[:, j] = _spectrum(w0, grid, A, noise, 2 * step)
    return kernel * step * 2 / np.pi


def _spectrum(w0: float, omega: Array, A: Array, noise: Array, least: float) -> Array:
    """Int_0^inf <v v(t)> cos(wt) dt of one oscillator: Re [(A + iw)^-1 C]_vv of the process (w0 q, v, s)."""
    n = len(A) + 1
    drift, diffusion = np.zeros((n, n)), np.zeros((n, n))
    # with w0 q for q, both rows of the oscillator have the size of w0
    drift[0, 1], drift[1, 0] = -w0, w0
    drift[1:, 1:] = A
    diffusion[1:, 1:] = noise
    stationary = solve_continuous_lyapunov(drift, diffusion)
    if drift[1, 1] < least:
        drift[1, 1] = least
    values, vectors = np.linalg.eig(drift)
    weights = vectors[1] * np.linalg.solve(vectors, stationary[:, 1].astype(complex))
    return (weights / (values + 1j * omega[:, None])).sum(axis=1).real


def deconvolve(
    omega: Array,
    spectrum: Array,
    kernel: Array,
    steps: int = 500,
    keep_every: int = 10,
    error: Array | None = None,
    progress: Callable[[float], None] | None = None,
) -> Deconvolution:
    """Undisturbed spectrum from an observed one by ISRA.

    Parameters
    ----------
    omega : Array
        The grid [rad/fs], shape (n,).
    spectrum : Array
        Observed spectrum, shape (n,); negative values count as zero.
    kernel : Array
        From `thermostat_kernel`, shape (n, n).
    steps, keep_every : int
        Most steps, and how often the history is kept.
    error : Array, optional
        Standard error of the spectrum, shape (n,): the steps end when chi^2 falls to one per point.
    progress : callable, optional
        Called with the fraction done.

    Raises
    ------
    DataError
        Shapes that do not fit, or an empty spectrum.
    """
    y = np.maximum(np.asarray(spectrum, dtype=float), 0.0)
    if kernel.shape != (len(y), len(y)) or len(omega) != len(y):
        raise DataError(
            f"A kernel of shape {kernel.shape} does not fit a spectrum of {len(y)} points.",
            "Make the kernel on the grid of the spectrum.",
        )
    if not y.any() or steps < 1:
        raise DataError("There is nothing to deconvolve.", "Give a spectrum, and at least one step.")
    target, square = kernel.T @ y, kernel.T @ kernel
    tiny = np.finfo(float).tiny
    weight = None if error is None else 1.0 / np.maximum(error, 1e-3 * np.max(error)) ** 2
    enough = 1 + np.sqrt(2 / len(y))  # chi^2 per point and its own scatter
    f, chi2 = y.copy(), None
    kept, history = [], []
    for k in range(1, steps + 1):
        f = f * target / np.maximum(square @ f, tiny)
        if weight is not None:
            chi2 = float(np.mean(weight * (kernel @ f - y) ** 2))
        done = k == steps or (chi2 is not None and chi2 <= enough)
        if k % keep_every == 0 or k == 1 or done:
            kept.append(k)
            history.append(f)
            if progress is not None:
                progress(1.0 if done else k / steps)
        if done:
            break
    spectra = np.array(history)
    residual = ((spectra @ kernel.T - y) ** 2).sum(axis=1)
    roughness = (np.diff(spectra, 2, axis=1) ** 2).sum(axis=1)
    return Deconvolution(omega, f, kernel @ f, np.array(kept), spectra, residual, roughness, kept[-1], chi2)


def without_thermostat(
    vibrations: Vibrations,
    drift: Array,
    covariance: Array | None = None,
    highest: float = 5000.0,
    steps: int = 500,
    progress: Callable[[float], None] | None = None,
) -> tuple[Deconvolution, ...]:
    """Densities of states of a run, each without the mark of the thermostat.

    The grid is thinned to a quarter of the resolution of the run, which the padded transform oversamples.

    Parameters
    ----------
    vibrations : Vibrations
        Of the thermostatted run.
    drift, covariance : Array
        From `thermostat_of`.
    highest : float
        Last wavenumber [cm^-1].
    steps : int
        Most steps; where the densities have errors, fewer (`deconvolve`).
    progress : callable, optional
        Called with the fraction done.

    Returns
    -------
    tuple of Deconvolution
        In the order of ``vibrations.elements``, densities in 1/eV at the energies hbar * omega.

    Raises
    ------
    DataError
        As `deconvolve`.
    """
    stride = max(1, int(0.25 * vibrations.resolution / vibrations.step))
    taken = slice(0, int(highest * EV_PER_INVCM / vibrations.step) + 1, stride)
    omega = vibrations.energies[taken] / HBAR
    kernel = thermostat_kernel(omega, drift, covariance)
    found = []
    for k, element in enumerate(vibrations.elements):
        error = None if element.error is None else element.error[taken]
        found.append(deconvolve(omega, element.density[taken], kernel, steps, error=error))
        if progress is not None:
            progress((k + 1) / len(vibrations.elements))
    return tuple(found)
