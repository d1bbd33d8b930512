"""``nnqmd spectrum draw``: pictures, tables and the report again, from NeXus files that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnqmd_server.cli.spectrum import options, words
from nnqmd_server.cli.spectrum import options as o

EXAMPLES = """
Examples:

  nnqmd spectrum draw runs/ammonia/ins.nxs --experiment measured.dat

  nnqmd spectrum draw runs/ammonia/ins.nxs --out figures
"""


def draw(
    source: Annotated[Path, typer.Argument(metavar="FILE.nxs", help="what `nnqmd spectrum ins`, ... wrote")],
    out: o.Out = None,
    formats: o.Formats = o.EVERY_FORMAT,
    pictures: o.Pictures = True,
    experiment: o.Measured = None,
    experiment_unit: o.MeasuredUnit = "",
    fit_range: o.FitRange = (30.0, 4000.0),
) -> None:
    """Draw a spectrum again without computing it again, for example beside a measurement."""
    from nnqmd_server.spectra.output.experiment import read_experiment, with_experiment
    from nnqmd_server.spectra.output.nexus import read_nexus
    from nnqmd_server.spectra.output.save import save

    options.check_unit(experiment_unit)
    result = read_nexus(source)
    if experiment is not None:
        result = with_experiment(result, read_experiment(experiment, experiment_unit), *fit_range)
    with words.progress("writing") as tell:
        written = save(result, out or source.parent, [f.value for f in formats], pictures, progress=tell)
    words.show(result, written)
