"""Neutron scattering cross-sections of bound atoms, from periodictable or as the user says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nnqmd_server.errors import DataError


@dataclass(frozen=True)
class CrossSection:
    """Bound scattering cross-sections of one kind of atom.

    Parameters
    ----------
    coherent, incoherent : float
        [barn].
    source : str
        Where the numbers come from.
    """

    coherent: float
    incoherent: float
    source: str

    @property
    def total(self) -> float:
        """Coherent and incoherent together [barn]."""
        return self.coherent + self.incoherent


Overrides = Mapping[str, str | float]
"""Label or group name -> isotope (``"D"``, ``"C13"``) or total cross-section [barn]."""


def tabulated(symbol: str) -> CrossSection:
    """Cross-sections of an i-PI label: an element, D, T, or a symbol with a mass number such as O18."""
    import periodictable

    match = re.fullmatch(r"([A-Z][a-z]?)(\d*)", symbol)
    try:
        if match is None or symbol == "H2":  # i-PI's H2 is a whole molecule
            raise KeyError(symbol)
        atom = periodictable.elements.symbol(match[1])
        if match[2]:
            atom = atom[int(match[2])]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"There is no neutron cross-section for {symbol!r}.",
            "Use element symbols, D and T for heavy hydrogen, or a symbol with a mass number such as C13.",
        ) from error
    if atom.neutron.total is None:
        raise DataError(f"The neutron cross-section of {symbol} is not known.", "Replace this isotope.")
    # the parts are rounded apart in the tables: what is not coherent is counted as incoherent
    coherent = min(float(atom.neutron.coherent), float(atom.neutron.total))
    return CrossSection(coherent, float(atom.neutron.total) - coherent, f"{symbol}, periodictable")


def cross_section(symbol: str) -> float:
    """Total bound scattering cross-section of an i-PI label [barn], from periodictable."""
    return tabulated(symbol).total


def cross_section_of(symbol: str, group: str = "", overrides: Overrides | None = None) -> CrossSection:
    """Cross-sections of a kind of atom, after the user's overrides; those of a group go first.

    An override changes how the atoms scatter, not how they move: a D that was simulated as H keeps the
    motion of H.

    Parameters
    ----------
    symbol : str
        i-PI's label.
    group : str
        Name of the group, if any.
    overrides : mapping, optional
        See `Overrides`.
    """
    chosen = (overrides or {}).get(group) if group else None
    chosen = (overrides or {}).get(symbol) if chosen is None else chosen
    if chosen is None:
        return tabulated(symbol)
    if isinstance(chosen, str):
        return tabulated(chosen)
    if not 0 <= chosen < 1e5:
        raise DataError(
            f"A cross-section of {chosen:g} barn for {group or symbol} makes no sense.", "Give barn."
        )
    return CrossSection(0.0, float(chosen), "given")


def check_overrides(overrides: Overrides | None, names: set[str]) -> None:
    """Refuse an override of something that is not there."""
    unknown = sorted(set(overrides or {}) - names)
    if unknown:
        raise DataError(
            f"There are no atoms or groups called {', '.join(unknown)} to give a cross-section to.",
            f"There are: {', '.join(sorted(names))}.",
        )
