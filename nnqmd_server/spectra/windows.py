"""Windows on correlation functions, and the width that they give to a sharp line."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from nnqmd_server.errors import DataError

Array = np.ndarray
Window = Literal["hann", "gaussian", "none"]

_GAUSSIAN_ENDS = 3.0  # the Gaussian window falls to exp(-4.5), 1 %, at the last lag


def window(name: Window, n_lags: int) -> Array:
    """Half a window: one at lag zero, falling to the last lag; shape (n_lags,).

    "hann" is cos^2 and ends at zero, "gaussian" ends at 1 % (three sigma), "none" is one throughout,
    whose sharp end gives every line side lobes of 21 % of its height, partly negative.
    """
    check_window(name)
    x = np.arange(n_lags) / n_lags
    if name == "hann":
        return 0.5 * (1 + np.cos(np.pi * x))
    if name == "gaussian":
        return np.exp(-0.5 * (_GAUSSIAN_ENDS * x) ** 2)
    return np.ones(n_lags)


def window_width(name: Window, lag: float) -> float:
    """Full width at half maximum of a sharp line [1/fs] under a window of length ``lag`` [fs].

    The numbers are half-width points of the cosine transforms of the windows on [0, lag]: 1/lag for
    "hann", 0.6034/lag for "none" (from sin(x)/x), and for "gaussian" sqrt(2 ln 2) 3/(pi lag), widened by
    0.5 % by its end at three sigma.
    """
    check_window(name)
    return {"hann": 1.00000, "gaussian": _GAUSSIAN_WIDTH, "none": 0.603355}[name] / lag


_GAUSSIAN_WIDTH = 1.129639


def check_window(name: str) -> None:
    """Refuse a name that is no window."""
    if name not in get_args(Window):
        raise DataError(
            f"There is no window called {name!r}.", f"Choose one of {', '.join(get_args(Window))} (--window)."
        )
