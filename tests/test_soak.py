"""Hours in minutes: requests without end, and a worker killed every 500 of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    ("requests", "minutes"),
    [
        pytest.param(2_000, 0.0, marks=pytest.mark.slow),
        pytest.param(100_000, 10.0, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_nothing_is_lost_or_wrong_and_memory_stays_flat(tmp_path, requests, minutes):
    made = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "benchmarks/pool.py", "--only", "soak", "--json", made]
    subprocess.run(
        [*command, "--requests", str(requests), "--minutes", str(minutes)], check=True, timeout=1700
    )
    figures = json.loads(made.read_text())
    assert figures["soak.requests"] >= requests
    assert figures["soak.kills"] >= requests // 500
    assert figures["soak.lost"] == 0
    assert figures["soak.wrong"] == 0
    assert figures["soak.rss_growth_mb"] < 10
