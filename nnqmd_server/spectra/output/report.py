"""One HTML page with everything that was found in a folder: pictures, tables, formulas, settings, versions.

The page holds its pictures and its style, and asks nothing of the network: it can be mailed or archived.
"""

from __future__ import annotations

import base64
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from html import escape
from importlib import metadata
from pathlib import Path

from nnqmd_server import __version__
from nnqmd_server.errors import DataError
from nnqmd_server.spectra.output.files import whole_file
from nnqmd_server.spectra.output.labelled import Result, Table
from nnqmd_server.spectra.output.nexus import read_nexus

KINDS = ("ins", "dos", "ir", "raman")
"""Order of the sections; a result of kind K is ``K.nxs``, its pictures are ``K.png`` and ``K-*.png``."""

_CAPTIONS = {
    "ins": "Both banks (a, b), and the first bank by the number of quanta exchanged (c, d).",
    "ins-elements": "What each element adds to the first bank.",
    "ins-map": "S(Q,E) of the powder, and the lines along which the instrument cuts it.",
    "ins-experiment": "Computed and measured; the measured spectrum was multiplied by one fitted factor.",
    "dos": "Vibrational density of states against the generalised one that neutrons see (a); by element (b).",
    "ir": "Infrared absorption with the standard error of every point; the dipole route is a check.",
    "raman": "Raman spectrum.",
}

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1a1a1a;
  background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem;
  border-bottom: 2px solid #0072B2; padding-bottom: .2rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p.sub { color: #555; margin: 0 0 1.2rem; }
nav a { margin-right: 1.2rem; color: #0072B2; }
figure { margin: 1rem 0 1.6rem; } figure img { width: 100%; height: auto; border: 1px solid #e3e3e3; }
figcaption { color: #444; font-size: .92rem; margin-top: .3rem; }
table { border-collapse: collapse; font-size: .92rem; margin: .3rem 0 1rem; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e3e3e3; }
table.numbers th, table.numbers td { text-align: right; padding-left: .8rem; }
table.settings th { font-weight: 600; white-space: nowrap; }
.note { background: #fff6e0; border-left: 4px solid #E69F00; padding: .35rem .8rem; margin: .4rem 0; }
pre { background: #f5f7f9; padding: .8rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap; }
summary { cursor: pointer; font-weight: 600; margin: .8rem 0 .3rem; } code { font-size: .92em; }
@media print { body { max-width: none; margin: 0; } figure { break-inside: avoid; } }
"""


def write_report(folder: Path, name: str = "") -> Path:
    """Write ``report.html`` about the results in a folder.

    Parameters
    ----------
    folder : Path
        Where ``ins.nxs``, ``dos.nxs``, ``ir.nxs`` and ``raman.nxs``, as many as there are, lie with their
        pictures. A picture older than its result belongs to an earlier one and is left out.
    name : str
        Title of the page; the folder's name by default.

    Raises
    ------
    DataError
        The folder holds no result.
    """
    results = [(kind, read_nexus(folder / f"{kind}.nxs")) for kind in KINDS if _is_there(folder, kind)]
    if not results:
        raise DataError(
            f"{folder} holds no spectrum ({', '.join(f'{k}.nxs' for k in KINDS)}).",
            "Run `nnqmd spectrum ins`, `dos` or `ir` with this folder as --out first.",
        )
    title = name or folder.resolve().name
    path = folder / "report.html"
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(_page(folder, title, results)), encoding="utf-8")
    return path


def _is_there(folder: Path, kind: str) -> bool:
    return (folder / f"{kind}.nxs").is_file()


def _page(folder: Path, title: str, results: list[tuple[str, Result]]) -> Iterator[str]:
    yield "<!DOCTYPE html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: spectra</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}</style></head><body>"
    yield f"<h1>{escape(title)}</h1>"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    yield f'<p class="sub">Spectra by nnqmd-server {escape(__version__)}, {now}</p>'
    links = " ".join(f'<a href="#{kind}">{escape(result.title)}</a>' for kind, result in results)
    yield f"<nav>{links}</nav>"
    for kind, result in results:
        yield from _section(folder, kind, result)
    yield "<h2>Versions</h2>"
    yield from _settings(_versions())
    yield "</body></html>"


def _section(folder: Path, kind: str, result: Result) -> Iterator[str]:
    yield f'<section id="{kind}"><h2>{escape(result.title)}</h2>'
    for note in result.notes:
        yield f'<p class="note">{escape(note)}</p>'
    for picture in _pictures(folder, kind):
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        caption = _CAPTIONS.get(picture.stem, "")
        yield (
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption or picture.stem)}">'
            f"<figcaption>{escape(caption)} <code>{escape(picture.name)}</code></figcaption></figure>"
        )
    for table in result.tables:
        yield from _table(table)
    yield "<h3>How it was made</h3>"
    yield f"<pre>{escape(chr(10).join(result.formulas))}</pre>"
    yield "<h3>Settings</h3>"
    yield from _settings(dict(result.settings))
    yield "<details><summary>Constants and columns</summary>"
    yield from _constants(result)
    yield from _columns(result)
    yield "</details>"
    files = sorted(p.name for p in folder.glob(f"{kind}*") if p.suffix in {".txt", ".nxs", ".csv", ".svg"})
    yield f"<p>Files: {', '.join(f'<code>{escape(f)}</code>' for f in files)}</p></section>"


def _pictures(folder: Path, kind: str) -> list[Path]:
    found = [folder / f"{kind}.png", *sorted(folder.glob(f"{kind}-*.png"))]
    made = (folder / f"{kind}.nxs").stat().st_mtime
    return [p for p in found if p.is_file() and p.stat().st_mtime >= made]


def _table(table: Table) -> Iterator[str]:
    yield f'<h3>{escape(table.title)}</h3><table class="numbers"><tr>'
    yield "".join(f"<th>{escape(c)}</th>" for c in table.columns) + "</tr>"
    for row in table.rows:
        yield "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>"
    yield "</table>"


def _settings(settings: dict[str, str]) -> Iterator[str]:
    yield '<table class="settings">'
    for name, value in settings.items():
        yield f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
    yield "</table>"


def _constants(result: Result) -> Iterator[str]:
    yield "<table><tr><th>constant</th><th>value</th><th>unit</th><th></th></tr>"
    for name, c in result.constants.items():
        yield (
            f"<tr><td><code>{escape(name)}</code></td><td>{c.value:.10g}</td><td>{escape(c.unit)}</td>"
            f"<td>{escape(c.meaning)}</td></tr>"
        )
    yield "</table>"


def _columns(result: Result) -> Iterator[str]:
    yield "<table><tr><th>array</th><th>unit</th><th>what</th><th>formula</th></tr>"
    for data in result.data:
        for q in (*data.axes, *data.coordinates, *data.curves):
            yield (
                f"<tr><td><code>{escape(data.name)}/{escape(q.name)}</code></td><td>{escape(q.unit)}</td>"
                f"<td>{escape(q.title)}</td><td><code>{escape(q.formula)}</code></td></tr>"
            )
    yield "</table>"


def _versions() -> dict[str, str]:
    versions = {"nnqmd-server": __version__, "Python": platform.python_version()}
    for package in ("numpy", "scipy", "h5py", "matplotlib", "periodictable", "ase", "ipi"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
