"""Decimal numbers out of text, fast: i-PI's fixed rows digit by digit in one array, other rows by words."""

from __future__ import annotations

import numpy as np

Array = np.ndarray

WIDTH = 12
"""Characters of a number that i-PI wrote with ``%12.5e``, such as `` 1.23456e-03``."""

_POWERS = np.array([1e5, 1e4, 1e3, 1e2, 1e1, 1.0], dtype=np.float32)
_UP = np.array([10.0 ** max(0, e - 5) for e in range(100)])
_DOWN = np.array([[10.0 ** max(0, 5 - e) for e in range(100)], [10.0 ** (5 + e) for e in range(100)]])


def fixed_numbers(text: Array) -> Array | None:
    """Numbers written with ``%12.5e``, bit for bit as `float` reads them.

    The six digits make a whole number and the power of ten is one exact factor (up to 10^22, beyond
    which the last bit may differ), so one rounding happens, as in a correct parser.

    Parameters
    ----------
    text : Array
        Characters, uint8, shape (n, 12).

    Returns
    -------
    Array or None
        Shape (n,); None when one of them is not written that way (nan, inf, exponents of three digits).
    """
    digits = text[:, [1, 3, 4, 5, 6, 7]] - 48
    exponents = text[:, 10:12] - 48  # wraps round below "0", so one comparison sees both sides
    sign, power_sign = text[:, 0], text[:, 9]
    negative, small = sign == 45, power_sign == 45
    fine = (
        digits.max(initial=0) <= 9
        and exponents.max(initial=0) <= 9
        and (text[:, 2] == 46).all()
        and (text[:, 8] == 101).all()
        and (negative | (sign == 32)).all()
        and (small | (power_sign == 43)).all()
    )
    if not fine:
        return None
    whole = (digits.astype(np.float32) @ _POWERS).astype(float)  # below 2^24: exact
    power = exponents[:, 0].astype(np.intp) * 10 + exponents[:, 1]
    values = whole / _DOWN[small.astype(np.intp), power]
    up = ~small & (power > 5)
    if up.any():
        values[up] *= _UP[power[up]]
    np.negative(values, out=values, where=negative)
    return values


def words_to_table(text: bytes | str, n_rows: int, columns: tuple[int, ...]) -> tuple[int, list, Array]:
    """Columns of numbers out of rows of words.

    Parameters
    ----------
    text : bytes or str
        The rows.
    n_rows : int
        How many rows there must be.
    columns : tuple of int
        Which words of a row are wanted as numbers.

    Returns
    -------
    int
        Words in a row.
    list
        All words.
    Array
        Shape (n_rows, len(columns)).

    Raises
    ------
    ValueError
        Rows of different length, or a word that is no number.
    """
    words = text.split()
    width, rest = divmod(len(words), n_rows)
    if rest or width <= max(columns):
        raise ValueError(f"{len(words)} words on {n_rows} lines")
    table = np.empty((n_rows, len(columns)))
    for k, column in enumerate(columns):
        table[:, k] = [float(word) for word in words[column::width]]
    return width, words, table
