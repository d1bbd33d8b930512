"""What stands on the command line for a potential."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, crystal

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials.load import absolute, card_of, load, parse_models
from nnqmd_server.structures import from_ase

PYTHON = """
import numpy as np
from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import Results

class Springs:
    form = "numpy"
    card = Card("springs", "0" * 64, (), 0.0, "float64")
    def evaluate(self, structures):
        beads = [structures.positions[structures.atoms_of(k)] for k in range(len(structures))]
        energy = [0.5 * (bead**2).sum() for bead in beads]
        return Results(np.array(energy), -structures.positions, np.zeros((len(structures), 3, 3)))

def springs(device):
    return Springs()

def nothing(device):
    raise OSError("no such springs")
"""


def test_names():
    assert parse_models(["a/b.nequip.zip"]) == {"b": "a/b.nequip.zip"}
    assert parse_models(["full=b.nequip.zip", "x.py:cheap"]) == {
        "full": "b.nequip.zip",
        "cheap": "x.py:cheap",
    }


@pytest.mark.parametrize("bad", [["a.nequip.zip", "b/a.nequip.zip"], ["x y.nequip.zip"], [""]])
def test_bad_names_are_errors_in_words(bad):
    with pytest.raises(InputError):
        parse_models(bad)


def test_a_python_potential(tmp_path):
    (tmp_path / "mine.py").write_text(PYTHON)
    source = f"{tmp_path}/mine.py:springs"
    assert card_of(source) is None
    beads = from_ase([crystal(seed=k) for k in range(2)])
    assert np.array_equal(load(source).evaluate(beads).forces, -beads.positions)
    for bad in ("mine.py:nothing", "mine.py:unknown", "gone.py:springs"):
        with pytest.raises(ModelError, match="cannot be loaded"):
            load(f"{tmp_path}/{bad}")


def test_sources_keep_their_meaning_in_another_folder(monkeypatch):
    monkeypatch.chdir(MODEL.parent)
    assert absolute(MODEL.name) == str(MODEL)
    assert absolute("mine.py:springs") == f"{Path.cwd()}/mine.py:springs"
    assert absolute("package.module:springs") == "package.module:springs"
