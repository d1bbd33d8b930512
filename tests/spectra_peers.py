"""Calling other programs, each in an environment of its own, for the tests marked ``peer``."""

import json
import os
import subprocess
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WATER = Path(__file__).parent / "data" / "water-8.npz"


def interpreter(name):
    """The python of a peer's environment, from NNQMD_<NAME>_PYTHON; the test is skipped without it."""
    variable = f"NNQMD_{name.upper()}_PYTHON"
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} does not name the python of an environment with {name}")
    return path


def call(python, script, *arguments, settings=None, folder=None, timeout=250):
    """Run a script of benchmarks/ there."""
    arguments = [str(a) for a in arguments]
    if settings is not None:
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps(settings))
        arguments.append(str(path))
    done = subprocess.run(
        [python, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
