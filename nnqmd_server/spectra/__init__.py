"""From trajectories to the spectra that an instrument would show.

What stands in `__all__` is public: it keeps its name and its meaning. Nothing is imported before it is
asked for. docs/spectra.md shows how the pieces fit together.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "correlation": ("default_lag",),
    "cross_sections": ("CrossSection", "cross_section", "cross_section_of"),
    "currents": ("Current", "current_of_charges", "current_of_dipoles"),
    "debye_waller": ("DebyeWallerCheck", "debye_waller_check"),
    "deconvolution": (
        "Deconvolution",
        "deconvolve",
        "thermostat_kernel",
        "thermostat_of",
        "without_thermostat",
    ),
    "dielectric": ("DielectricConstant", "dielectric_constant"),
    "diffusion": ("looks_liquid",),
    "dipole_files": (
        "Dipoles",
        "Polarizabilities",
        "read_dipole_extras",
        "read_dipoles",
        "read_polarizability_extras",
    ),
    "displacement": ("gaussian_function", "mean_square_displacements"),
    "incoherent": ("scattering_function", "structure_factor"),
    "inelastic": ("NeutronSpectrum", "neutron_spectrum"),
    "infrared": ("InfraredSpectrum", "infrared_spectrum"),
    "instruments": (
        "TOSCA",
        "VISION",
        "Bank",
        "DirectSpectrometer",
        "IndirectSpectrometer",
        "direct",
        "kinematic_limits",
    ),
    "liquid": ("LiquidCorrection", "correction_of"),
    "modes": ("Modes", "read_modes", "vibrations_of_modes"),
    "output.columns": ("write_columns",),
    "output.contents_dos": ("dos_result",),
    "output.contents_ins": ("ins_result",),
    "output.contents_ir": ("ir_result",),
    "output.contents_raman": ("raman_result",),
    "output.experiment": ("Experiment", "read_experiment", "with_experiment"),
    "output.labelled": ("Labelled", "Quantity", "Result", "to_scipp"),
    "output.nexus": ("read_nexus", "write_nexus"),
    "output.oclimax": ("write_oclimax", "write_velocity_dump"),
    "output.report": ("write_report",),
    "output.save": ("draw", "save"),
    "qe_map": ("ScatteringMap", "map_of"),
    "quantum": ("quantum_factor", "quantum_spectrum"),
    "raman": ("RamanSpectrum", "raman_spectrum"),
    "running": ("Correlations", "RunningCorrelation", "velocity_correlations"),
    "statistics": ("Blocks", "Estimate", "jackknife"),
    "store": ("convert",),
    "trajectory": ("Trajectory", "open_beads", "open_trajectory"),
    "uncertainty": ("standard_errors",),
    "vectors": ("QVectors", "free_vectors", "lattice_vectors", "powder_vectors"),
    "vibrations": ("Vibrations", "densities_of_states", "generalised_density"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
