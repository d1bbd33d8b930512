"""Loaded by i-PI through <pes_path>: the direct door to a pool of nnqmd workers."""

from nnqmd_server.doors.direct import *  # noqa: F403
