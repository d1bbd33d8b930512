"""``nnqmd spectrum``: what a neutron, infrared or Raman spectrometer would show of finished runs."""

from __future__ import annotations

import typer

from nnqmd_server.cli.spectrum import convert, dos, draw, ins, ir, raman

app = typer.Typer(
    help="Neutron (ins, dos), infrared (ir) and Raman spectra of finished runs: pictures, tables, NeXus "
    "files and one HTML report.",
    no_args_is_help=True,
)
app.command("ins", epilog=ins.EXAMPLES)(ins.ins)
app.command("dos", epilog=dos.EXAMPLES)(dos.dos)
app.command("ir", epilog=ir.EXAMPLES)(ir.ir)
app.command("raman", epilog=raman.EXAMPLES)(raman.raman)
app.command("draw", epilog=draw.EXAMPLES)(draw.draw)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
