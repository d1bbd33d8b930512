"""A pool's status on one screen, for ``nnqmd status`` and ``nnqmd top``."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nnqmd_server.pool.watch import plain

NEWS = 6
LEAST_ROWS = 3
BLOCKS = " ▁▂▃▄▅▆▇█"


def screen(
    status: dict[str, Any], address: str, silent: float | None = None, height: int | None = None
) -> RenderableType:
    """All of a status; tables are cut where the screen has fewer lines.

    Parameters
    ----------
    status : dict
        As the pool says it, see :class:`~nnqmd_server.pool.scheduler.Status`.
    address : str
        Where it was asked.
    silent : float, optional
        For how long it has not answered [s].
    height : int, optional
        Lines of the screen; no table is cut unless given.
    """
    workers, simulations = status["workers"], status["simulations"]
    rows_of_workers, rows_of_simulations = len(workers), len(simulations)
    if height is not None:
        room = height - 14 - NEWS - len(status["cards"])
        rows_of_workers = min(rows_of_workers, max(LEAST_ROWS, room // 2))
        rows_of_simulations = min(rows_of_simulations, max(LEAST_ROWS, room - rows_of_workers))
    parts = [
        _head(status, address, silent),
        Text(),
        _potentials(status["cards"]),
        Text(),
        _workers(workers, rows_of_workers),
        Text(),
        _simulations(simulations, rows_of_simulations),
    ]
    if status["news"]:
        parts += [Text(), _news(status["news"], status["now"])]
    return Group(*parts)


def _head(status: dict[str, Any], address: str, silent: float | None) -> RenderableType:
    workers, simulations = status["workers"], status["simulations"]
    head = Text()
    head.append(address, style="bold")
    head.append(
        f"  process {status['pid']} on {status['host']}, up {span(status['now'] - status['started'])},"
        f" version {status['version']}"
    )
    if silent is not None:
        head.append(f"\nno answer for {span(silent)}; shown is the last one", style="bold red")
    pace = sum(one["force_sets_per_second"] for one in simulations)
    busy = sum(one["busy_share"] for one in workers) / len(workers) if workers else 0.0
    head.append(
        f"\n{number(pace)} force sets/s, {status['force_sets']} in all"
        f" ({status['structures']} structures), {status['waiting']} waiting; workers {busy:.0%} busy\n"
    )
    trouble = [
        (status["failed"], "force set failed", "force sets failed"),
        (status["retries"], "retry", "retries"),
        (status["lost_workers"], "worker lost", "workers lost"),
        (status["quarantined"], "quarantined", "quarantined"),
        (status["refused"], "refused", "refused"),
        (
            sum(status.get("turned_away", {}).values()),
            "turned away for its keys",
            "turned away for their keys",
        ),
    ]
    words = ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in trouble if count)
    head.append(words or "no failure, no retry, no worker lost", style="yellow" if words else "dim")
    history = status["history"]
    counts = history["force_sets"][-60:]
    if any(counts):
        top = max(counts)
        line = "".join(BLOCKS[-(-8 * count // top)] for count in counts)
        seconds = len(counts) * history["seconds"]
        head.append(f"\n{line}", style="cyan")
        head.append(f" last {span(seconds)}, up to {number(top / history['seconds'])}/s", style="dim")
    return head


def _table(*columns: tuple[str, bool]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, is_number in columns:
        wide = name in {"simulation", "device, form", "what happened"}
        table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=not wide)
    return table


def _potentials(cards: dict[str, Any]) -> RenderableType:
    if not cards:
        return Text("no potential yet: no worker has been ready", style="yellow")
    table = _table(("potential", False), ("model", False), ("elements", False), ("sha256", False))
    for name, card in cards.items():
        words = (name, card["name"], " ".join(card.get("elements") or ()), str(card.get("sha256", ""))[:12])
        table.add_row(*(Text(plain(word)) for word in words))
    return table


def _workers(workers: list[dict[str, Any]], most: int) -> RenderableType:
    if not workers:
        return Text("no worker is ready", style="bold yellow")
    table = _table(
        ("worker", True),
        ("machine", False),
        ("process", True),
        ("device, form", False),
        ("atoms/s", True),
        ("structures", True),
        ("busy", True),
        ("", False),
    )
    for one in workers[:most]:
        forms = dict.fromkeys([one.get("device"), *one["forms"].values()])
        share = one["busy_share"]
        table.add_row(
            str(one["index"]),
            Text(plain(one["host"], 64)),
            str(one["pid"]),
            Text(plain("; ".join(form for form in forms if form))),
            number(one["atoms_per_second"]),
            str(one["structures"]),
            f"{share:.0%}",
            Text("leaving", style="yellow")
            if one["leaving"]
            else Text("█" * round(10 * share), style="cyan"),
        )
    return _cut(table, len(workers) - most, "workers")


def _simulations(simulations: list[dict[str, Any]], most: int) -> RenderableType:
    if not simulations:
        return Text("no simulation has asked for forces yet", style="dim")
    named = len({one["potential"] for one in simulations}) > 1
    table = _table(
        ("simulation", False),
        *[("potential", False)] * named,
        ("atoms", True),
        ("beads", True),
        ("sets/s", True),
        ("force sets", True),
        ("failed", True),
        ("now", False),
    )
    latest = sorted(simulations, key=lambda one: (one["idle"] or 0.0, one["name"]))
    for one in latest[:most]:
        if one["waiting"] and one["waits"] > 2:
            now = Text(f"waits {span(one['waits'])}", style="yellow" if one["waits"] > 60 else "")
        else:
            idle = one["idle"] or 0.0
            now = Text(f"idle {span(idle)}" if idle > 5 else "running", style="dim")
        table.add_row(
            Text(plain(one["name"], 64)),
            *[Text(plain(one["potential"], 64))] * named,
            str(one["atoms"]),
            str(one["beads"]),
            number(one["force_sets_per_second"]),
            str(one["force_sets"]),
            Text(str(one["failed"]), style="red" if one["failed"] else ""),
            now,
        )
    return _cut(table, len(simulations) - most, "simulations")


def _cut(table: Table, more: int, what: str) -> RenderableType:
    return Group(table, Text(f"and {more} {what} more", style="dim")) if more > 0 else table


def _news(news: list[dict[str, Any]], now: float) -> RenderableType:
    table = _table(("", True), ("what happened", False))
    for one in reversed(news[-NEWS:]):
        style = "red" if one["event"] in {"lost", "failed", "quarantined"} else ""
        table.add_row(
            Text(f"{span(max(0.0, now - one['time']))} ago", style="dim"),
            Text(plain(one["text"]), style=style),
        )
    return table


def number(value: float | None) -> str:
    """A quantity in few characters: 0.42, 37.5, 12.3 k."""
    if value is None:
        return "-"
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == ' k' else unit):.3g}{name}"
    return "0" if value == 0 else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def span(seconds: float) -> str:
    """A time in one unit: 3.2 s, 12 min, 5.0 h."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"
    return f"{seconds / 86400:.1f} days"
