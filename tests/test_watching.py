"""What a pool shows of itself: status, top, metrics, log and page, against what was really done."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
from conftest import crystal
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from typer.testing import CliRunner
from watching import BEADS, side_by_side, toy_pool, wait_until

from nnqmd_server.cli import app
from nnqmd_server.cli.screen import screen
from nnqmd_server.cli.status import find_address
from nnqmd_server.errors import AddressError, InputError, PoolError, StructureError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.json_log import JsonLog
from nnqmd_server.pool.link import connect
from nnqmd_server.pool.messages import MAX_HEADER, Message, pack
from nnqmd_server.pool.tallies import SECONDS, Tally, WorkerWatch
from nnqmd_server.pool.watch import _COUNTED, EACH_FORCE_SET, MAX_NEWS, MAX_SIMULATIONS, Watch, in_words
from nnqmd_server.pool.web import Web
from nnqmd_server.structures import from_ase


@pytest.fixture
def made(tmp_path):
    with toy_pool(tmp_path) as pool:
        yield pool


def read(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return answer.read().decode(), answer.headers


def metrics(url):
    """All samples by name and labels, through the parser of the Prometheus client."""
    families = text_string_to_metric_families(read(url + "metrics")[0])
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def some_trouble(made):
    """Two simulations; a worker that cannot, one that dies; a door that sends rubbish. What was asked."""
    good = made.add(1, delay=0.01)
    made.add(2, delay=0.01)
    small = from_ase([crystal(seed=9)])
    one, other = made.client("one"), made.client("other")

    def ask(client, structures, times):
        for _ in range(times):
            client.submit(structures)

    side_by_side(lambda: ask(one, BEADS, 6), lambda: ask(other, small, 9))
    link = connect(made.address, None, "door")
    assert link.send([b"\x80\x04rubbish"])
    assert link.receive(5.0)
    link.close()
    good.spoil = made.workers[1].spoil = lambda answer: _not_finite(answer)
    with pytest.raises(StructureError):
        other.submit(small)
    good.spoil = made.workers[1].spoil = None
    made.pool.worker_died(2)
    wait_until(lambda: len(made.pool.status().workers) == 1)
    return {"one": (6, 48), "other": (9, 9)}


def _not_finite(answer):
    answer.arrays["energy"] = answer.arrays["energy"] * float("nan")
    return answer


# ---- status and top ------------------------------------------------------------------------------


def test_the_status_says_what_was_done(made):
    asked = some_trouble(made)
    status = made.client().status()
    assert status == json.loads(json.dumps(status))
    assert (status["force_sets"], status["structures"]) == (15, 57)
    assert (status["failed"], status["lost_workers"], status["refused"]) == (1, 1, 1)
    assert status["retries"] >= 1
    found = {one["name"]: one for one in status["simulations"]}
    for name, (force_sets, structures) in asked.items():
        assert (found[name]["force_sets"], found[name]["structures"]) == (force_sets, structures)
        assert not found[name]["waiting"]
        assert found[name]["force_sets_per_second"] > 0
    assert (found["one"]["atoms"], found["one"]["beads"]) == (16, 8)
    assert (found["one"]["failed"], found["other"]["failed"]) == (0, 1)
    assert [w["index"] for w in status["workers"]] == [1]
    assert status["workers"][0]["structures"] <= 57
    assert 0 < status["workers"][0]["busy_share"] <= 1
    assert status["workers"][0]["atoms_per_second"] > 0
    assert {"joined", "unable", "failed", "lost", "refused"} <= {one["event"] for one in status["news"]}
    assert sum(status["history"]["force_sets"]) <= 15


def test_a_simulation_that_waits_is_seen_waiting(made):
    made.add(1, delay=1.0)
    asking = threading.Thread(target=made.client("patient").submit, args=(BEADS,))
    asking.start()
    wait_until(lambda: made.status()["simulations"])
    time.sleep(0.3)
    status = made.status()
    assert status["simulations"][0]["waiting"]
    assert 0.2 < status["simulations"][0]["waits"] < 1.0
    assert status["workers"][0]["busy"]
    assert status["workers"][0]["busy_share"] > 0.1  # what it is at counts
    asking.join(10)
    assert not made.status()["simulations"][0]["waiting"]


def test_nnqmd_status_on_the_command_line(made, tmp_path):
    run = CliRunner().invoke
    command = ["status", "--pool", made.address]
    empty = run(app, command)
    assert empty.exit_code == 3
    assert "no worker is ready" in empty.output
    some_trouble(made)
    shown = run(app, command)
    assert shown.exit_code == 0
    for words in (
        "15 in all",
        "57 structures",
        "1 force set failed",
        "1 worker lost",
        "one",
        "other",
        "toy",
        "aaaaaaaaaaaa",
    ):
        assert words in shown.output
    assert run(app, [*command, "--least", "2"]).exit_code == 3
    as_json = run(app, [*command, "--json"])
    assert json.loads(as_json.output)["force_sets"] == 15
    started = time.monotonic()
    nobody = run(app, ["status", "--pool", f"ipc://{tmp_path}/nobody", "--patience", "0.5"])
    assert isinstance(nobody.exception, PoolError)  # main() prints it and exits with 1
    assert "0 s" in nobody.exception.what or "1 s" in nobody.exception.what
    assert time.monotonic() - started < 4


def test_the_only_pool_of_this_machine_is_found(tmp_path, monkeypatch):
    """`nnqmd run` listens in a folder of its own; what a killed pool has left behind is passed over."""
    monkeypatch.delenv("NNQMD_POOL", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usual = f"ipc://{tmp_path}/nnqmd-{os.getuid()}/pool"
    listening = []

    def listen(folder):
        (tmp_path / folder).mkdir(mode=0o700)
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.bind(str(tmp_path / folder / "pool"))
        one.listen()
        listening.append(one)
        return f"ipc://{tmp_path}/{folder}/pool"

    try:
        assert find_address("") == usual
        listen("nnqmd-dead")
        listening.pop().close()
        assert find_address("") == usual
        first = listen("nnqmd-abc")
        assert find_address("") == first
        assert find_address("tcp://127.0.0.1:1") == "tcp://127.0.0.1:1"
        second = listen("nnqmd-def")
        with pytest.raises(InputError, match="Several pools") as several:
            find_address("")
        assert first in several.value.what
        assert second in several.value.what
        assert listen(f"nnqmd-{os.getuid()}") == usual
        assert find_address("") == usual
        monkeypatch.setenv("NNQMD_POOL", "ipc:///elsewhere")
        assert find_address("") == "ipc:///elsewhere"
    finally:
        for one in listening:
            one.close()


def test_names_in_the_terminal_are_text_not_markup(made):
    made.add(1)
    made.client("[red]loud[/] \x1b[31m").submit(BEADS)
    shown = CliRunner().invoke(app, ["status", "--pool", made.address]).output
    assert "[red]loud[/]" in shown
    assert "\x1b[31m" not in shown


def test_top_shows_the_pool_until_it_is_stopped(made, monkeypatch):
    made.add(1)
    made.client("one").submit(BEADS)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) > 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("nnqmd_server.cli.status.time.sleep", sleep)
    ran = CliRunner().invoke(app, ["top", "--pool", made.address, "--every", "0.5"])
    assert ran.exit_code == 0, ran.exception
    assert looks == [0.5] * 3
    assert "one" in ran.output


def test_the_status_of_a_thousand_workers_is_a_message(made):
    """Doors ask for the status too: it must never outgrow the wire."""
    made.add(1)
    status = made.status()
    status["workers"] = [status["workers"][0] | {"forms": {"toy": "compiled for cuda, " * 5}}] * 1000
    status["simulations"] = [
        {**one, "name": "n" * 64} for one in [*made.watch.simulations(), *[_simulation()] * MAX_SIMULATIONS]
    ]
    status["news"] = [{"time": 1.6e9, "event": "failed", "text": "w" * 500}] * MAX_NEWS
    assert len(pack(Message("status", status))[0]) < MAX_HEADER


def _simulation():
    watch = Watch()
    watch("asked", {"simulation": "x", "request": 1, "potential": "p" * 64, "structures": 32, "atoms": 9999})
    return watch.simulations()[0]


# ---- how shares and paces are measured -----------------------------------------------------------


def test_the_busy_share_is_that_of_the_last_half_minute():
    worker = WorkerWatch(1, "here", joined=0.0)
    for second in range(100):  # 0.4 s of work in every second
        worker.given(second, second)
        exact = 0.4 * (second + 1) / (second + 0.4) if second < 30 else 0.4
        assert worker.busy_share(second + 0.4) == pytest.approx(exact, abs=0.02)
        worker.ended(second, second + 0.4)
        worker.busy_seconds += 0.4
        worker.mark(second + 0.4)
    assert worker.busy_share(100.0) == pytest.approx(0.4, abs=0.02)
    assert worker.busy_share(115.0) == pytest.approx(0.2, abs=0.02)  # idle for the second half
    assert worker.busy_share(131.0) == 0.0
    worker.given(200, 200.0)  # one long batch
    worker.given(201, 210.0)  # the next is in hand already
    assert worker.busy_share(215.0) == pytest.approx(0.5, abs=0.01)
    assert worker.busy_share(1000.0) == pytest.approx(1.0)


def test_the_pace_of_a_simulation_is_that_of_its_latest_force_sets():
    clock = [0.0]
    watch = Watch(lambda: clock[0])
    what = {"simulation": "s", "potential": "p", "structures": 4, "atoms": 64}
    for step in range(200):
        clock[0] = 0.25 * step
        watch("asked", {**what, "request": step})
        watch("answered", {**what, "request": step, "wait": 0.0, "elapsed": 0.1})
    assert watch.simulations()[0]["force_sets_per_second"] == pytest.approx(4.0)
    assert watch.history()["force_sets"][-20:] == [8] * 20
    clock[0] += 20
    assert watch.simulations()[0]["force_sets_per_second"] == 0.0
    assert watch.simulations()[0]["idle"] == pytest.approx(20)
    clock[0] += 4000
    assert watch.simulations() == []


def test_what_is_remembered_is_bounded():
    watch = Watch()
    for k in range(2000):
        what = {"simulation": f"s{k}", "potential": f"p{k}", "structures": 1, "atoms": 1, "request": k}
        watch("asked", what)
        watch("answered", {**what, "wait": 0.0, "elapsed": 0.0})
        watch("refused", {"whom": f"w{k}", "what": "rubbish"})
    assert len(watch.simulations()) == MAX_SIMULATIONS
    assert len(watch.potentials()) <= 65
    assert sum(one.force_sets for one in watch.potentials().values()) == 2000
    assert len(watch.news()) == MAX_NEWS
    assert dict(watch.refused) == {"door": 2000}


def test_a_tally_counts_values_up_to_each_bound():
    tally = Tally(SECONDS)
    for value in (0.0005, 0.001, 0.002, 1000.0):
        tally.add(value)
    assert tally.counts[:2] == [2, 1]
    assert tally.counts[-1] == 1


# ---- metrics and page ----------------------------------------------------------------------------


@pytest.fixture
def web(made):
    web = Web(0, made.watch, made.status)
    yield web
    web.close()


def test_the_metrics_are_what_was_done(made, web):
    asked = some_trouble(made)
    found = metrics(web.url)
    toy = frozenset({("potential", "toy")})
    assert found["nnqmd_force_sets_total", toy] == 15
    assert found["nnqmd_structures_total", toy] == 57
    none = frozenset()
    assert found["nnqmd_workers", none] == 1
    assert found["nnqmd_workers_joined_total", none] == 2
    assert found["nnqmd_workers_lost_total", none] == 1
    assert found["nnqmd_force_sets_failed_total", none] == 1
    assert found["nnqmd_quarantined_total", none] == 0
    assert found["nnqmd_refused_total", frozenset({("whom", "door")})] == 1
    assert found["nnqmd_retries_total", none] >= 1
    for name, (force_sets, structures) in asked.items():
        key = frozenset({("simulation", name), ("potential", "toy")})
        assert found["nnqmd_simulation_force_sets_total", key] == force_sets
        assert found["nnqmd_simulation_structures_total", key] == structures
    shares = {k: v for (k, labels), v in found.items() if k == "nnqmd_worker_busy_share"}
    assert len(shares) == 1
    assert 0 < shares["nnqmd_worker_busy_share"] <= 1
    # every batch that was given is in the histogram, with its size
    given = sum(len(w.shares) for w in made.workers)
    assert found["nnqmd_batch_structures_count", toy] == given
    assert found["nnqmd_batch_structures_sum", toy] == sum(sum(w.shares) for w in made.workers)
    bounds = {
        dict(labels)["le"]: v for (k, labels), v in found.items() if k == "nnqmd_batch_structures_bucket"
    }
    ones = sum(count == 1 for w in made.workers for count in w.shares)
    assert (bounds["1.0" if "1.0" in bounds else "1"], bounds["+Inf"]) == (ones, given)
    assert found["nnqmd_queue_wait_seconds_count", toy] == found["nnqmd_answer_seconds_count", toy] == 15
    assert found["nnqmd_queue_wait_seconds_sum", toy] <= found["nnqmd_answer_seconds_sum", toy]
    assert found["nnqmd_compute_seconds_sum", toy] == pytest.approx(
        0.01 * found["nnqmd_compute_seconds_count", toy]  # what a toy worker says of itself
    )
    assert found["process_resident_memory_bytes", none] > 1e6


def test_connections_without_the_right_keys_are_shown(made):
    made.add(1)
    status = made.status() | {"turned_away": {"wrong_key": 2, "no_handshake": 1}}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(screen(status, made.address))
    assert "3 turned away for their keys" in console.export_text()
    web = Web(0, made.watch, lambda: status)
    try:
        found = metrics(web.url)
    finally:
        web.close()
    assert found["nnqmd_turned_away_total", frozenset({("why", "wrong_key")})] == 2


def test_the_page_is_served_to_this_machine_only(made, web):
    port = int(web.url.rsplit(":", 1)[1].strip("/"))
    hosts = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for host in hosts - {"127.0.0.1"}:
        with pytest.raises(OSError, match=r".*"):
            socket.create_connection((host, port), timeout=1).close()
    assert web._server.server_address[0] == "127.0.0.1"
    for name in (f"127.0.0.1:{port}", "localhost", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert "nnqmd pool" in read(web.url, Host=name)[0]
    for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost@evil", ""):
        for path in ("", "status.json", "metrics"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                read(web.url + path, Host=name)
            assert refused.value.code == 403
    with pytest.raises(AddressError, match="in use"):
        Web(port, made.watch, made.status)


def test_nothing_can_be_changed_over_http(web):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        for path in ("", "status.json", "metrics", "stop"):
            request = urllib.request.Request(web.url + path, data=b"x" * 1000, method=method)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=10)
            assert refused.value.code == 405
            assert refused.value.headers["Allow"] == "GET, HEAD"
            assert "Access-Control-Allow-Origin" not in refused.value.headers


def test_the_page_asks_nobody_else(web):
    page, headers = read(web.url)
    addresses = set(re.findall(r"https?://[^'\"\s)>]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of a language, asked by nobody
    assert not re.findall(r"<(?:link|script|img|iframe)[^>]*(?:src|href)=[\"'](?!data:)", page)
    assert not re.findall(r"url\(|@import|innerHTML|insertAdjacentHTML|document\.write|eval\(", page)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert page.count("<script>") == policy.count("script-src 'sha256-") == 1


@pytest.mark.peer
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_shows_the_pool_as_text(made, web):
    """Its own policy lets the page's script run, and a hostile name stays text."""
    some_trouble(made)
    made.client("<img src=x onerror=document.title=1>").submit(BEADS)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--virtual-time-budget=3000", "--dump-dom", web.url]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    body = shown[shown.index("<body>") : shown.index("<script>")]
    for words in ("serving", ">one<", ">other<", ">toy<", "worker 2 (process 2 on", "&lt;img src=x"):
        assert words in body
    assert "<img" not in body
    assert "<title>nnqmd pool</title>" in shown
    assert re.search(r'id="curve" d="M[\d.]+ ', body)


def test_clients_that_say_nothing_do_not_keep_others_out_for_long(web, monkeypatch):
    monkeypatch.setattr("nnqmd_server.pool.web._Handler.timeout", 0.5)
    port = int(web.url.rsplit(":", 1)[1].strip("/"))
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    try:
        wait_until(lambda: _answers(web.url), 5)
        assert threading.active_count() < 40
    finally:
        for one in silent:
            one.close()


def _answers(url):
    try:
        return "nnqmd" in read(url)[0]
    except OSError:
        return False


# ---- the log -------------------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("everything", [False, True])
def test_the_log_counts_right(made, tmp_path, everything):
    path = tmp_path / "logs" / "pool.log"
    log = JsonLog(path, made.watch, everything, every=0.2)
    some_trouble(made)
    time.sleep(0.5)
    log.close()
    lines = lines_of(path)
    counts = {
        name: sum(line["event"] == name for line in lines) for name in {line["event"] for line in lines}
    }
    assert (lines[0]["event"], lines[-1]["event"]) == ("opened", "closed")
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert (counts["joined"], counts["lost"], counts["failed"], counts["refused"]) == (2, 1, 1, 1)
    assert counts["summary"] >= 3
    last = next(line for line in reversed(lines) if line["event"] == "summary")
    assert (last["force_sets"], last["structures"], last["workers"]) == (15, 57, 1)
    if everything:
        assert (counts["asked"], counts["answered"]) == (16, 15)
        assert counts["given"] == sum(len(w.shares) for w in made.workers)
        assert counts["done"] + counts["unable"] == counts["given"]
        assert sum(line["structures"] for line in lines if line["event"] == "answered") == 57
    else:
        assert not {"asked", "given", "done", "answered"} & set(counts)
    made.client().submit(BEADS)
    assert len(lines_of(path)) == len(lines)  # closed


def test_every_event_of_the_log_is_in_the_operators_page(tmp_path):
    from pathlib import Path

    import nnqmd_server.pool.dispatch
    import nnqmd_server.pool.json_log
    import nnqmd_server.pool.scheduler

    page = (Path(__file__).parents[1] / "docs/operating.md").read_text()
    found = set()
    for module in (nnqmd_server.pool.dispatch, nnqmd_server.pool.scheduler, nnqmd_server.pool.json_log):
        source = Path(module.__file__).read_text()
        found |= set(re.findall(r"\.tell\(\s*\"(\w+)\"", source))
        found |= set(re.findall(r"_write\(time\.time\(\), \"(\w+)\"", source))
    assert {"joined", "lost", "answered", "summary", "closed", "left_out"} <= found
    assert not {event for event in found if f"`{event}`" not in page}


def test_the_log_is_bounded_and_never_holds_up_the_pool(tmp_path):
    watch = Watch()
    path = tmp_path / "pool.log"
    log = JsonLog(path, watch, max_bytes=20_000)
    for k in range(500):
        watch("refused", {"whom": "door", "what": f"rubbish number {k}"})
        if not k % 50:
            time.sleep(0.02)
    log.close()
    assert path.stat().st_size <= 20_000
    older = path.with_name("pool.log.1")
    assert older.stat().st_size <= 20_000
    assert lines_of(older)[-1]["what"] != lines_of(path)[0].get("what")
    # a disk that does not take it: the lines are counted and left out
    log = JsonLog(tmp_path / "slow.log", watch)
    stuck = threading.Event()
    log._write = lambda *line: stuck.wait(10)
    started = time.monotonic()
    for k in range(20_000):
        watch("refused", {"whom": "door", "what": str(k)})
    assert time.monotonic() - started < 5
    assert log._left_out >= 9_000
    stuck.set()
    log.close()


def test_every_event_has_words():
    fields = {"worker": 1, "pid": 2, "host": "h", "what": "why", "structures": 3, "atoms": 4, "whom": "door"}
    fields |= {"simulation": "s", "request": 5}
    for event in _COUNTED - EACH_FORCE_SET | {"retried", "quarantined", "late", "memory"}:
        assert not in_words(event, fields).startswith(event + " {")


# ---- memory --------------------------------------------------------------------------------------


def test_memory_stays_flat_with_everything_on(made, web, tmp_path):
    """After a first thousand force sets, two thousand more keep no more objects; the answers stay right."""
    log = JsonLog(tmp_path / "pool.log", made.watch, everything=True, max_bytes=100_000)
    small = from_ase([crystal(seed=1)])
    made.add(1)
    client = PoolClient(made.address, 10.0, name="soak")

    def ask(count):
        for k in range(count):
            client.submit(small)
            if not k % 200:
                metrics(web.url)
        gc.collect()
        return len(gc.get_objects())

    try:
        before = ask(1000)
        assert ask(2000) - before < 1000
    finally:
        client.close()
        log.close()
    assert made.status()["force_sets"] == 3000
