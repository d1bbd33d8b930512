"""Memory that door, pool and workers of one user on one machine share, so that large arrays need not travel.

A segment belongs to the process that made it and has no name in the file system: it is gone when the last
process that uses it is gone, however that ended. Others reach it through ``/proc`` by process, file
descriptor and inode; the kernel lets only the same user do so. It can neither shrink nor grow any more, so
nobody who reads it can be hurt by its owner.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from nnqmd_server.structures import Array

Place = list[int]
"""Where something lies: process, file descriptor, inode, offset [bytes]."""

MAX_ATTACHED = 64
"""Segments of others that are kept attached, the latest used."""

_ADD_SEALS, _GET_SEALS = 1033, 1034  # fcntl(2); Python knows them from 3.13 on
_SEALED = 0x1 | 0x2 | 0x4  # no further seals, no shrinking, no growing


class UnreachableError(ValueError):
    """A place that is not shared with this process."""


def near(address: str) -> bool:
    """Whether both ends of an address are on one machine, and memory can be shared there."""
    return address.startswith("ipc://") and sys.platform == "linux"


class _Segment:
    """One piece of shared memory, mapped."""

    def __init__(self, fd: int, owner: int, number: int) -> None:
        found = os.fstat(fd)
        self.key = (owner, number, found.st_ino)
        self.data = np.frombuffer(mmap.mmap(fd, found.st_size), dtype=np.uint8)
        self.first = self.data.__array_interface__["data"][0]
        self.last = self.first + found.st_size


class Bulk:
    """Shared memory as one process sees it: its own segment, and those of others."""

    def __init__(self) -> None:
        self._own: _Segment | None = None
        self._fd = -1
        self._others: OrderedDict[tuple[int, int, int], _Segment] = OrderedDict()

    def room(self, size: int) -> Array:
        """Bytes of our own segment, shape (size,); what was there before may be overwritten."""
        if self._own is None or self._own.last - self._own.first < size:
            self.retire()
            fd = os.memfd_create("nnqmd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, 1 << max(12, (size - 1).bit_length()))
            fcntl.fcntl(fd, _ADD_SEALS, _SEALED)
            self._fd, self._own = fd, _Segment(fd, os.getpid(), fd)
        return self._own.data[:size]

    def retire(self) -> None:
        """Never use our segment again: somebody may write into it later. The next one is a new one."""
        if self._own is not None:
            os.close(self._fd)
            self._own, self._fd = None, -1

    def find(self, array: Array) -> Place | None:
        """Where a contiguous array lies, when it is in shared memory."""
        address = array.__array_interface__["data"][0]
        own = self._own
        if own is not None and own.first <= address < own.last:
            return [*own.key, address - own.first]
        for segment in reversed(self._others.values()):
            if segment.first <= address < segment.last:
                return [*segment.key, address - segment.first]
        return None

    def view(self, place: Sequence[int], dtype: np.dtype | str, shape: Sequence[int]) -> Array:
        """The array that lies at a place.

        Raises
        ------
        UnreachableError
            It is not shared with us, or is shorter than that.
        """
        owner, number, inode, offset = (int(x) for x in place)
        segment = self._segment((owner, number, inode))
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if offset < 0 or offset % 8 or offset + size > len(segment.data):
            raise UnreachableError("an array that is not within its shared memory")
        return np.ndarray(shape, dtype, segment.data, offset)

    def adopt(self, other: Bulk) -> None:
        """Know the segment of another one of this process, so that what lies there is found."""
        if other._own is not None:
            self._others[other._own.key] = other._own
            self._keep_the_latest()

    def still_shared(self, array: Array) -> bool:
        """Whether the owner of an array is there, and holds it, so that others can still reach it."""
        place = self.find(array)
        try:
            return place is not None and _attach(*place[:3]) is not None
        except UnreachableError:
            return False

    def _segment(self, key: tuple[int, int, int]) -> _Segment:
        if self._own is not None and self._own.key == key:
            return self._own
        if key not in self._others:
            self._others[key] = _attach(*key)
            self._keep_the_latest()
        self._others.move_to_end(key)
        return self._others[key]

    def _keep_the_latest(self) -> None:
        while len(self._others) > MAX_ATTACHED:
            self._others.popitem(last=False)

    def close(self) -> None:
        """Give up everything; arrays that are still in use stay valid."""
        self.retire()
        self._others.clear()


def _attach(owner: int, number: int, inode: int) -> _Segment:
    try:
        fd = os.open(f"/proc/{owner}/fd/{number}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnreachableError(f"memory of process {owner} cannot be reached: {error.strerror}") from error
    try:
        if fcntl.fcntl(fd, _GET_SEALS) & _SEALED != _SEALED or os.fstat(fd).st_ino != inode:
            raise UnreachableError(f"process {owner} shares no such memory")
        return _Segment(fd, owner, number)
    except OSError as error:  # not such a file at all
        raise UnreachableError(f"process {owner} shares no memory there: {error.strerror}") from error
    finally:
        os.close(fd)
