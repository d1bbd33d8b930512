"""The few array operations behind `incoherent`, by NumPy and SciPy on a CPU or by torch on a GPU."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np
from scipy import fft

from nnqmd_server.errors import InputError

Array = np.ndarray


class Backend(Protocol):
    """What `incoherent` asks for; arrays are those of the library behind it."""

    def threads(self, wanted: int | None) -> int:
        """Threads over atoms."""

    def block_bytes(self, cache: int) -> int:
        """Size of a block of vectors [bytes]."""

    def zeros(self, rows: int, columns: int) -> Any:
        """float32."""

    def turns(self, values: Array) -> Any:
        """float64 from NumPy."""

    def powers(self, turns: Any, lowest: int, highest: int, exact_every: int) -> Any:
        """exp(2 pi i k turns) for k from lowest to highest, complex64."""

    def product(self, factors: list[tuple[Any, Array]], size: int) -> Any:
        """Rows of tables multiplied with each other, padded with zeros to ``size`` columns."""

    def add_power(self, power: Any, e: Any, shells: Array, origins: tuple[int, int] | None) -> None:
        """Add |FFT(e)|^2 to the rows of the shells; with origins (every, stop), conj(FFT(o e)) FFT(e).

        o is one at every so manieth column before ``stop`` and zero elsewhere. ``e`` may be overwritten.
        """

    def add_lags(self, total: Any, e: Any, shells: Array, every: int, n_origins: int) -> None:
        """Add Re Sum_o e(o)* e(o+l) over the origins 0, every, ... to the rows of the shells, l = 0, 1, ...

        By matrix products: with l = a every + b, the sum over o is a product over stretches of ``every``.
        """

    def to_numpy(self, values: Any) -> Array:
        """As a NumPy array."""


class OnCpu:
    """NumPy and SciPy: as fast as torch here, and without its 200 MB of memory."""

    def threads(self, wanted: int | None) -> int:
        """All cores by default."""
        return wanted or len(os.sched_getaffinity(0))

    def block_bytes(self, cache: int) -> int:
        """What fits a core's cache."""
        return cache

    def zeros(self, rows: int, columns: int) -> Array:
        """Zeros."""
        return np.zeros((rows, columns), dtype=np.float32)

    def turns(self, values: Array) -> Array:
        """Contiguous."""
        return np.ascontiguousarray(values)

    def powers(self, turns: Array, lowest: int, highest: int, exact_every: int) -> Array:
        """By products, anew from the angle every few steps."""
        table = np.empty((highest - lowest + 1, len(turns)), dtype=np.complex64)
        step = None
        for k in range(len(table)):
            if k % exact_every == 0:
                table[k] = _cis(turns, lowest + k)
            else:
                if step is None:
                    step = _cis(turns, 1)
                np.multiply(table[k - 1], step, out=table[k])
        return table

    def product(self, factors: list[tuple[Array, Array]], size: int) -> Array:
        """Row by row, which stays in the cache."""
        (first, which), *others = factors
        n = first.shape[1]
        result = np.empty((len(which), size), dtype=np.complex64)
        result[:, n:] = 0
        if not others:
            result[:, :n] = first[which]
            return result
        second, along = others[0]
        for row, i, j in zip(result[:, :n], which, along, strict=True):
            np.multiply(first[i], second[j], out=row)
        for table, rows in others[1:]:
            for row, i in zip(result[:, :n], rows, strict=True):
                np.multiply(row, table[i], out=row)
        return result

    def add_power(self, power: Array, e: Array, shells: Array, origins: tuple[int, int] | None) -> None:
        """Real and imaginary parts stay interleaved, which the processor adds fastest."""
        if origins is None:
            parts = fft.fft(e, overwrite_x=True).view(np.float32)
            if (np.diff(shells) == 1).all():
                power[shells[0] : shells[-1] + 1] += np.square(parts, out=parts)
                return
            for shell, rows in _runs(shells):
                power[shell] += np.einsum("ij,ij->j", parts[rows], parts[rows])
            return
        every, stop = origins
        size = e.shape[1]
        # the transform of a comb repeats itself
        begins = np.conj(fft.fft(e[:, :stop:every], size // every))[:, None]
        parts = (fft.fft(e, overwrite_x=True).reshape(len(e), every, -1) * begins).reshape(len(e), size)
        for shell, rows in _runs(shells):
            power[shell] += parts.view(np.float32)[rows].sum(axis=0)

    def add_lags(self, total: Array, e: Array, shells: Array, every: int, n_origins: int) -> None:
        """The left factor holds the origins, shifted row by row, real parts above imaginary ones."""
        n_rows = e.shape[1] // every
        reach = total.shape[1] // every
        ends = np.zeros((len(e), 2, n_rows + reach - 1), dtype=np.float32)
        start = e[:, : n_origins * every : every]
        ends[:, 0, reach - 1 : reach - 1 + n_origins] = start.real
        ends[:, 1, reach - 1 : reach - 1 + n_origins] = start.imag
        shifted = np.lib.stride_tricks.sliding_window_view(ends, n_rows, axis=2)[:, :, ::-1]
        left = np.ascontiguousarray(shifted).reshape(len(e), 2 * reach, n_rows)
        both = left @ e.view(np.float32).reshape(len(e), n_rows, 2 * every)
        lags = both[:, :reach, 0::2] + both[:, reach:, 1::2]
        for shell, rows in _runs(shells):
            total[shell] += lags[rows].sum(axis=0).reshape(-1)

    def to_numpy(self, values: Array) -> Array:
        """Itself."""
        return values


def _runs(shells: Array) -> list[tuple[int, slice]]:
    """Stretches of equal shell."""
    starts = np.flatnonzero(np.diff(shells, prepend=-1))
    return [(shells[a], slice(a, b)) for a, b in zip(starts, [*starts[1:], len(shells)], strict=True)]


def _cis(turns: Array, multiple: int) -> Array:
    angle = turns * multiple
    if abs(multiple) > 1:
        angle -= np.rint(angle)
    angle = (2 * np.pi * angle).astype(np.float32)
    result = np.empty(len(turns), dtype=np.complex64)
    np.cos(angle, out=result.real)
    np.sin(angle, out=result.imag)
    return result


class OnTorch:
    """torch, on the device it is given."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch = torch
        self.device = torch.device(device)

    def threads(self, wanted: int | None) -> int:
        """One queue feeds the device."""
        return wanted or 1

    def block_bytes(self, cache: int) -> int:
        """Enough to fill a GPU."""
        return 256 * cache

    def zeros(self, rows: int, columns: int) -> Any:
        """Zeros."""
        return self.torch.zeros((rows, columns), dtype=self.torch.float32, device=self.device)

    def turns(self, values: Array) -> Any:
        """As float64."""
        return self.torch.as_tensor(np.ascontiguousarray(values), device=self.device)

    def powers(self, turns: Any, lowest: int, highest: int, exact_every: int) -> Any:
        """Each from its angle: a GPU has sines to spare."""
        angle = self.torch.arange(lowest, highest + 1, dtype=turns.dtype, device=self.device)[:, None] * turns
        angle = (2 * np.pi * (angle - self.torch.round(angle))).to(self.torch.float32)
        return self.torch.polar(self.torch.ones_like(angle), angle)

    def product(self, factors: list[tuple[Any, Array]], size: int) -> Any:
        """All rows at once."""
        result = 1.0
        for table, rows in factors:
            result = result * table[self.torch.as_tensor(rows, device=self.device)]
        return self.torch.nn.functional.pad(result, (0, size - result.shape[1]))

    def add_power(self, power: Any, e: Any, shells: Array, origins: tuple[int, int] | None) -> None:
        """As on a CPU."""
        spectrum = self.torch.fft.fft(e)
        if origins is None:
            parts = self.torch.view_as_real(spectrum).square()
        else:
            every, stop = origins
            begins = self.torch.fft.fft(e[:, :stop:every], n=e.shape[1] // every).conj()[:, None]
            parts = self.torch.view_as_real((spectrum.reshape(len(e), every, -1) * begins).reshape(e.shape))
        self._add(power, shells, parts)

    def add_lags(self, total: Any, e: Any, shells: Array, every: int, n_origins: int) -> None:
        """As on a CPU."""
        n_rows = e.shape[1] // every
        reach = total.shape[1] // every
        start = self.torch.view_as_real(e[:, : n_origins * every : every]).transpose(1, 2)
        ends = self.torch.nn.functional.pad(start, (reach - 1, n_rows - n_origins))
        left = ends.unfold(2, n_rows, 1).flip(2).reshape(len(e), 2 * reach, n_rows)
        both = left @ self.torch.view_as_real(e).reshape(len(e), n_rows, 2 * every)
        self._add(total, shells, both[:, :reach, 0::2] + both[:, reach:, 1::2])

    def _add(self, total: Any, shells: Array, parts: Any) -> None:
        where = self.torch.as_tensor(shells, device=self.device)
        total.index_add_(0, where, parts.reshape(len(shells), -1))

    def to_numpy(self, values: Any) -> Array:
        """Back on the host."""
        return values.cpu().numpy()


def backend_for(device: str) -> Backend:
    """The backend of a device: ``cpu``, ``auto`` (a GPU if torch sees one), or a torch device."""
    if device == "cpu":
        return OnCpu()
    try:
        import torch

        if device == "auto":
            return OnTorch("cuda") if torch.cuda.is_available() else OnCpu()
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU")
        return OnTorch(device)
    except (RuntimeError, ImportError) as error:
        raise InputError(
            f"The device {device!r} cannot be used ({error}).", "Use cpu, or auto for a GPU if there is one."
        ) from error
