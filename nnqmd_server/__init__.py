"""Neural-network forces for i-PI path-integral dynamics, and the spectra that follow.

Kept free of imports: i-PI loads ``nnqmd_server.doors.direct`` and nequip loads
``nnqmd_server.networks`` through this package, and neither may pay for the rest.
"""

__version__ = "0.1.0"
