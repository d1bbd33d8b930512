"""What is learned beyond Allegro: read-outs as a nequip extension.

``import nequip`` loads this package through its entry point, so it must stay light: importing
``nequip.model`` or ``nequip.utils`` here would be circular. ``nequip-package build`` puts this
package, and nothing else of nnqmd-server, into a packaged model: its files import nothing
from their sister rooms. They also take nothing from this ``__init__``, which would draw the whole of
``nequip.data`` into the package, with ASE and torchmetrics behind it.
"""

from nequip.data import register_fields
from nequip.scripts._compile_utils import BATCH_TARGET, register_compile_targets

from nnqmd_server.networks.keys import WANNIER_CENTROID_KEY

BATCH_WITH_WANNIER = "nnqmd_batch"
"""Compile target: nequip's batch target and the Wannier centroids."""

register_fields(node_fields=[WANNIER_CENTROID_KEY])
register_compile_targets(
    {BATCH_WITH_WANNIER: {**BATCH_TARGET, "output": [*BATCH_TARGET["output"], WANNIER_CENTROID_KEY]}}
)
