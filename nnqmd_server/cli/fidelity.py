"""``nnqmd fidelity``: how long simulations with a model stay physical, against the number of atoms."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nnqmd_server.cli.sharpness import measure_sharpness, parse_noise, sharpness_table
from nnqmd_server.cli.terminal import console

if TYPE_CHECKING:
    from ase import Atoms

    from nnqmd_server.fidelity.report import Series
    from nnqmd_server.fidelity.sharpness import Sharpness
    from nnqmd_server.fidelity.simulation import Case, Protocol
    from nnqmd_server.fidelity.study import Record

EXAMPLES = """
Examples:

  nnqmd fidelity plain.nequip.zip legato.nequip.zip --structure examples/ammonia/phase1.xyz --sizes 16,64,128

  nnqmd fidelity MODEL.nequip.zip --structure cell.xyz --sizes 128,432 --beads 1,16 --seeds 20 --steps 200000

  nnqmd fidelity MODEL.nequip.zip --structure cell.xyz --sizes 432,3456 --temperature 200 --timestep 2.5
      --isotope H=D --tau 250 --seeds 10 --steps 1000000
      the settings of the published measurement

  nnqmd fidelity MODEL.nequip.zip --structure cell.xyz --sizes 64 --frames data.xyz
      sharpness on these frames beside it

The same command goes on where it was stopped; more seeds, sizes, beads or models are added, and with more
--steps the runs that were censored go on. docs/fidelity.md tells what is measured.
"""


def fidelity(
    model: Annotated[
        list[str], typer.Argument(metavar="[NAME=]MODEL...", help="one or several models, as for nnqmd run")
    ],
    structure: Annotated[
        str, typer.Option(metavar="FILE[@INDEX]", help="periodic structure of which supercells are made")
    ],
    sizes: Annotated[str, typer.Option(help="numbers of atoms, multiples of those of the structure")],
    beads: Annotated[str, typer.Option(help="numbers of beads; 1 is classical")] = "1",
    seeds: Annotated[int, typer.Option(min=1, max=10000, help="runs of each size, each with a seed")] = 10,
    seed: Annotated[int, typer.Option(min=1, help="the first seed")] = 1,
    steps: Annotated[int, typer.Option(min=10, help="a run that comes so far is censored")] = 20000,
    temperature: Annotated[float, typer.Option(min=0.1, help="K")] = 200.0,
    timestep: Annotated[float, typer.Option(min=0.001, help="fs")] = 0.5,
    tau: Annotated[float, typer.Option(min=0.1, help="time of the thermostat, fs")] = 100.0,
    isotope: Annotated[list[str] | None, typer.Option(metavar="H=D", help="mass of another isotope")] = None,
    temperature_window: Annotated[
        float, typer.Option(min=0, help="failure: temperature farther than this from the set-point, K")
    ] = 100.0,
    temperature_sigmas: Annotated[
        float, typer.Option(min=0, help="but the window has at least so many canonical standard deviations")
    ] = 6.0,
    settle: Annotated[float, typer.Option(min=0, help="temperature is judged from this time on, fs")] = 500.0,
    distance_factor: Annotated[
        float, typer.Option(min=0.01, max=1.5, help="failure: atoms closer than this x covalent radii")
    ] = 0.6,
    min_distance: Annotated[
        list[str] | None, typer.Option(metavar="N-H=0.7", help="the same for one pair, Angstrom")
    ] = None,
    max_force: Annotated[
        float, typer.Option(min=0.1, max=1000.0, help="failure: force above this, eV/Angstrom")
    ] = 100.0,
    max_jump: Annotated[
        float, typer.Option(min=1e-4, help="failure: energy of a bead changes more in a step, eV/atom")
    ] = 0.5,
    distribution: Annotated[
        str, typer.Option(help="of times to failure: weibull or exponential")
    ] = "weibull",
    replicates: Annotated[int, typer.Option(min=100, max=100000, help="bootstrap data sets")] = 2000,
    frames: Annotated[
        Path | None, typer.Option(metavar="FILE", help="labelled frames (extxyz): measures the sharpness too")
    ] = None,
    noise: Annotated[
        str, typer.Option(help="relative noise on weights for the sharpness")
    ] = "0.01,0.02,0.05",
    draws: Annotated[int, typer.Option(min=2, max=1000, help="draws of the noise")] = 10,
    out: Annotated[Path, typer.Option(help="folder of the study")] = Path("runs/fidelity"),
    workers: Annotated[
        int | None, typer.Option(min=1, max=512, help="worker processes; one per core or GPU by default")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, max=512, help="simulations at a time; twice the workers by default")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help="do not compile the models")] = False,
    analyse_only: Annotated[
        bool, typer.Option("--analyse-only", help="run nothing: fit and draw the results that are there")
    ] = False,
) -> None:
    """Run simulations of several sizes until they fail, and fit t_failure ~ N^-beta.

    Classical and ring-polymer runs through one pool, several at a time; runs that do not fail are kept in the
    fit as censored. Writes results.jsonl, fidelity.json, fidelity.png and .svg.
    """
    from nnqmd_server.errors import InputError
    from nnqmd_server.fidelity.criteria import Criteria, parse_distances
    from nnqmd_server.fidelity.simulation import Protocol, supercell
    from nnqmd_server.fidelity.structure import read_structure
    from nnqmd_server.fidelity.study import claim, make_cases, read_results
    from nnqmd_server.potentials.load import parse_models, source_hash

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop softly
    if distribution not in {"weibull", "exponential"}:
        raise InputError(f"There is no distribution {distribution!r}.", "Use weibull or exponential.")
    models = parse_models(model)
    cell = read_structure(structure)
    numbers, counts = _whole(sizes, "--sizes"), _whole(beads, "--beads")
    for size in numbers:
        supercell(cell, size)
    criteria = Criteria(
        temperature_window,
        temperature_sigmas,
        settle,
        distance_factor,
        parse_distances(min_distance or []),
        max_force,
        max_jump,
    )
    protocol = Protocol(temperature, timestep, steps, tau, _isotopes(isotope or []), criteria)
    hashes = {name: source_hash(source) for name, source in models.items()}
    cases = make_cases(models, numbers, counts, range(seed, seed + seeds))
    _check_elements(models, cell)
    strengths = parse_noise(noise)
    claim(out, cell, protocol)
    if analyse_only:
        wanted = {(case, hashes[case.model]) for case in cases}
        records = [r for r in read_results(out) if (r.case, r.sha256) in wanted]
        if not records:
            raise InputError(f"{out} has no results of these runs.", "Leave out --analyse-only.")
    else:
        console.print(
            f"{len(cases)} runs of at most {steps} steps of {timestep:g} fs at {temperature:g} K, in {out}"
        )
        records = _run(cases, models, hashes, cell, protocol, out, workers, parallel, device, eager)
    sharpness = measure_sharpness(models, frames, strengths, draws) if frames else []
    series = _analyse(records, distribution, replicates)
    _show(series, sharpness)
    _write(out, series, sharpness, protocol)


def _run(
    cases: Sequence[Case],
    models: Mapping[str, str],
    hashes: Mapping[str, str],
    cell: Atoms,
    protocol: Protocol,
    out: Path,
    workers: int | None,
    parallel: int | None,
    device: str,
    eager: bool,
) -> list[Record]:
    from nnqmd_server.fidelity.study import run_study
    from nnqmd_server.pool.launch import LocalPool

    columns = (
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total} runs"),
        TextColumn("{task.fields[words]}"),
        TextColumn("left at most"),
        TimeRemainingColumn(),
    )
    with LocalPool(models, out / "logs", None, workers, device, eager) as pool:
        with console.status("starting the workers") as shown:
            pool.wait_ready(tell=lambda line: shown.update(line))
        many = parallel or 2 * pool.plan.workers
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=len(cases), words="")

            def tell(done: list[Record], steps: Mapping[Case, int]) -> None:
                failed = sum(record.failed for record in done)
                part = sum(steps.values()) / protocol.steps
                words = f"{failed} failed, {len(done) - failed} censored, {len(steps)} running"
                progress.update(bar, completed=len(done) + part, words=words)

            try:
                return run_study(cases, hashes, cell, protocol, out, pool.address, many, tell, pool.check)
            except KeyboardInterrupt:
                progress.stop()
                console.print(f"stopped; this goes on: {shlex.join(['nnqmd', *sys.argv[1:]])}")
                raise typer.Exit(130) from None


def _analyse(records: Sequence[Record], distribution: str, replicates: int) -> list[Series]:
    from nnqmd_server.fidelity.report import analyse
    from nnqmd_server.fidelity.study import by_series

    with console.status("bootstrap"):
        return [analyse(runs, records, distribution, replicates) for runs in by_series(records)]


def _show(series: Sequence[Series], sharpness: Sequence[Sharpness]) -> None:
    import numpy as np

    from nnqmd_server.fidelity.report import failures_needed

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", overflow="fold")
    for name in ("beads", "atoms", "runs", "failed", "mean time to failure (ps)", "68 % interval (ps)"):
        table.add_column(name, justify="right")
    for one in series:
        for size in one.sizes:
            mean = f"{size.mean * 1e-3:.3g}" if np.isfinite(size.mean) else "-"
            high = f"{size.high * 1e-3:.3g}" if np.isfinite(size.high) else "no bound"
            row = (size.atoms, size.runs, size.failures, mean, f"{size.low * 1e-3:.3g} to {high}")
            table.add_row(one.runs.model, str(one.runs.beads), *map(str, row))
    console.print(table)
    for one in series:
        console.print(f"[bold]{one.runs.name}[/]")
        if one.criteria:
            console.print(f"  failed by: {', '.join(f'{name} {n}' for name, n in one.criteria.items())}")
        if one.fit is None:
            console.print(f"  no beta: {one.why}")
            continue
        bounds = ", ".join(
            f"{100 * interval.level:.0f} % [{interval.low:.3f}, {interval.high:.3f}]"
            for interval in one.intervals
        )
        console.print(
            f"  beta = {one.fit.beta:.3f} +- {one.fit.beta_error:.3f}; bootstrap {bounds}"
            f" ({one.fit.failures} failures, {one.fit.runs - one.fit.failures} censored)"
        )
        better = "lower" if one.fit.aic < one.other.aic else "higher"
        shape = f"shape {one.fit.shape:.2f} +- {one.fit.shape_error:.2f}; " * (one.fit.shape_error > 0)
        console.print(
            f"  {one.fit.distribution}: {shape}AIC {better} by {abs(one.fit.aic - one.other.aic):.1f} than"
            f" {one.other.distribution} (beta {one.other.beta:.3f})"
        )
        console.print(f"  an error of 0.05 needs about {failures_needed(one.fit)} failures at these sizes")
    if sharpness:
        console.print(sharpness_table(sharpness))


def _write(out: Path, series: Sequence[Series], sharpness: Sequence[Sharpness], protocol: Protocol) -> None:
    from nnqmd_server.fidelity.plot import draw
    from nnqmd_server.fidelity.report import figures, write_figures

    write_figures(out / "fidelity.json", figures(series, sharpness))
    subtitle = (
        f"NVT at {protocol.temperature:g} K, steps of {protocol.timestep:g} fs, runs of at most"
        f" {protocol.steps * protocol.timestep * 1e-3:g} ps"
    )
    written = draw(out / "fidelity", series, sharpness, subtitle)
    names = ["results.jsonl", "fidelity.json", *[path.name for path in written]]
    console.print(f"everything is in [bold]{out}[/]: {', '.join(names)}")


def _check_elements(models: Mapping[str, str], cell: Atoms) -> None:
    from nnqmd_server.potentials.base import unknown_elements
    from nnqmd_server.potentials.load import card_of

    for source in models.values():
        card = card_of(source)
        unknown = sorted(set(cell.get_chemical_symbols()) - set(card.elements)) if card else []
        if card and unknown:
            raise unknown_elements(card, unknown)


def _whole(text: str, option: str) -> list[int]:
    from nnqmd_server.errors import InputError

    try:
        found = sorted({int(word) for word in text.replace(",", " ").split()})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise InputError(f"{option} {text!r} are not whole numbers above zero.", f"Write {option} 16,64,128.")
    return found


def _isotopes(texts: Sequence[str]) -> dict[str, str]:
    from nnqmd_server.errors import InputError

    found = {}
    for text in texts:
        element, _, isotope = text.partition("=")
        if element != "H" or isotope not in {"D", "T"}:
            raise InputError(f"--isotope {text!r} is not known.", "Write H=D or H=T.")
        found[element] = isotope
    return found
