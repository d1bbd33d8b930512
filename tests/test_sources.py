"""What a user writes for other programs' potentials and for composites."""

from __future__ import annotations

import hashlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import MODEL

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.inputs.run import check_virials
from nnqmd_server.potentials.load import (
    absolute,
    card_of,
    interpreter_of,
    own_name,
    parse_models,
    source_hash,
)
from nnqmd_server.potentials.sources import Composite, Foreign, identity, is_prefixed, lacks_virial, read

PES = "from ipi.pes.harmonic import *\n"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("ase:a.b.C", Foreign("ase", "a.b.C", {})),
        ("ase:m.py:maker,x=1,y=1e-3", Foreign("ase", "m.py:maker", {"x": 1, "y": 1e-3})),
        ("ase:a.B,u=true,v=None,w=none", Foreign("ase", "a.B", {"u": True, "v": None, "w": None})),
        (
            "ase:a.B,method=GFN2-xTB,file=x.xyz",
            Foreign("ase", "a.B", {"method": "GFN2-xTB", "file": "x.xyz"}),
        ),
        ("ase:a.B,kpts=(2,2,1),text='a,b'", Foreign("ase", "a.B", {"kpts": (2, 2, 1), "text": "a,b"})),
        ("ase:a.B,inner={'k': [1, 2]}", Foreign("ase", "a.B", {"inner": {"k": [1, 2]}})),
        ("ipi:harmonic,k1=0.02", Foreign("ipi", "harmonic", {"k1": 0.02})),
        ("deepmd:a/graph.pb,head=water", Foreign("deepmd", "a/graph.pb", {"head": "water"})),
        ("torchsim:m:maker", Foreign("torchsim", "m:maker", {})),
        ("committee:a.zip,b.zip", Composite("committee", ("a.zip", "b.zip"), (1.0, 1.0))),
        ("sum:a.zip,-0.5*b.zip,2e-1*c.zip", Composite("sum", ("a.zip", "b.zip", "c.zip"), (1.0, -0.5, 0.2))),
        (
            "sum:a.zip,0.5*ipi:harmonic,k1=0.02,verbose=true,x.py:maker",
            Composite("sum", ("a.zip", "ipi:harmonic,k1=0.02,verbose=true", "x.py:maker"), (1.0, 0.5, 1.0)),
        ),
    ],
)
def test_what_is_written_is_what_is_meant(text, meaning):
    assert is_prefixed(text)
    assert read(text) == meaning


@pytest.mark.parametrize(
    "other", ["a.nequip.zip", "file.py:maker", "module:maker", "ase", "ase:", "x/sum:y.zip"]
)
def test_other_sources_are_left_alone(other):
    assert not is_prefixed(other)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ase:a.B,x", "not of the form key=value"),
        ("ase:a.B,x=1,x=2", "x is given twice"),
        ("ase:a.B,,x=1", "a piece is empty"),
        ("ase:a.B,x=(1,2", "bracket or quotation mark is open"),
        ("ase:a.B,x='1", "bracket or quotation mark is open"),
        ("committee:a.zip", "has one member"),
        ("committee:a.zip,0.5*b.zip", "plain mean"),
        ("sum:committee:a.zip,b.zip", "has committee:a.zip in it"),
        ("committee:a.zip@/envs/x,b.zip", "interpreter in the middle"),
    ],
)
def test_what_cannot_be_read_is_an_error_in_words(text, words):
    with pytest.raises(InputError, match=words) as error:
        read(text)
    assert error.value.fix


def test_names_and_interpreters(tmp_path):
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.symlink_to("/bin/true")
    assert parse_models(
        ["cheap=ipi:harmonic,k1=0.02", f"ase:ase.calculators.emt.EMT,asap_cutoff=true@{tmp_path}"]
    )
    source, found = interpreter_of(f"committee:a.zip,b.zip@{tmp_path}")
    assert (source, found) == ("committee:a.zip,b.zip", str(python))
    assert own_name("ase:ase.calculators.emt.EMT,asap_cutoff=true") == "EMT"
    assert own_name("ase:mine.py:maker") == own_name("torchsim:mine.py:maker") == "maker"
    assert own_name("ipi:dir/mine.py,k=1") == "mine"
    assert own_name("deepmd:a/graph.pb") == "graph"
    assert own_name("sum:a.zip,b.zip") == "sum"


def test_files_keep_their_place_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "init.xyz").write_text("1\n\nH 0 0 0\n")
    (tmp_path / "mine.py").write_text(PES)
    (tmp_path / "word").write_text("")
    here = str(Path.cwd())
    assert (
        absolute("ipi:mine.py,template=init.xyz,k1=1") == f"ipi:{here}/mine.py,template={here}/init.xyz,k1=1"
    )
    assert absolute("ase:mine.py:calc") == f"ase:{here}/mine.py:calc"
    assert absolute("ase:a.b.C,model=word") == "ase:a.b.C,model=word"  # a bare word is no path
    assert absolute("torchsim:a.b:C,x=1") == "torchsim:a.b:C,x=1"
    assert absolute("sum:mine.py:maker,0.5*a.zip") == f"sum:{here}/mine.py:maker,0.5*{here}/a.zip"


def test_hashes_and_identities_follow_contents_not_names(tmp_path):
    files = [tmp_path / name for name in ("a.py", "b.py", "c.py")]
    for path, text in zip(files, (PES, PES, PES + "#"), strict=True):
        path.write_text(text)
    same = hashlib.sha256(PES.encode()).hexdigest()
    assert source_hash(f"ipi:{files[0]},k1=1") == same
    assert source_hash("ase:a.b.C,x=1") == ""
    marks = [identity(read(f"ipi:{path},k1=1")) for path in files]
    assert marks[0] == marks[1] != marks[2]
    assert identity(read(f"ipi:{files[0]},k1=2")) != marks[0]
    with pytest.raises(ModelError, match="no file"):
        source_hash(f"ipi:{tmp_path}/gone.py")


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ("ase:a.B,stress=none", True),
        ("ase:a.B,stress=finite", False),
        ("sum:a.zip,0.5*torchsim:a:b,stress=none", True),
        ("a.zip", False),
    ],
)
def test_no_barostat_follows_a_virial_of_zero(source, lacks, tmp_path):
    assert lacks_virial(source) == lacks
    for mode in ("npt", "nvt"):
        root = ElementTree.fromstring(f"<simulation><motion><dynamics mode='{mode}'/></motion></simulation>")
        if lacks and mode == "npt":
            with pytest.raises(InputError, match="virial of zero"):
                check_virials(root, tmp_path / "input.xml", [source])
        else:
            check_virials(root, tmp_path / "input.xml", [source])


def test_cards_without_loading(tmp_path):
    assert card_of("ipi:harmonic,k1=1") is None
    assert card_of(f"sum:{MODEL},ipi:harmonic,k1=1") is None
    alone, both = card_of(str(MODEL)), card_of(f"committee:{MODEL},{MODEL}")
    assert both.elements == alone.elements
    assert both.cutoff == alone.cutoff
    assert both.properties == (
        *alone.properties,
        "committee_energy",
        "committee_forces",
        "committee_virial",
    )
    assert both.sha256 not in {alone.sha256, card_of(f"sum:{MODEL},{MODEL}").sha256}
    with pytest.raises(ModelError, match="no model file"):
        card_of(f"committee:{MODEL},{tmp_path}/gone.nequip.zip")
    with pytest.raises(ModelError, match="no file"):
        card_of(f"deepmd:{tmp_path}/gone.pb")
