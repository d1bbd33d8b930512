"""Compute the reference with CP2K: phase I, its phonons, the molecule. An interrupted run goes on.

python label.py phase1 --work /some/folder       # about 12 structures of 16 atoms
python label.py phonons --work /some/folder      # 12 more
python label.py molecule --work /some/folder     # about 15 boxes of 8 Angstrom
"""

from __future__ import annotations

import argparse
from pathlib import Path

import quantities
from ase import Atoms
from compare import model_evaluate

from nnqmd_server.labels.codes import Code, parse_code
from nnqmd_server.labels.frames import write_frames
from nnqmd_server.labels.store import Store, key_of

HERE = Path(__file__).resolve().parent
GUIDE = HERE.parent / "models" / "small" / "ammonia-small.nequip.zip"


def kept(code: Code, work: Path) -> quantities.Evaluate:
    """A code as an evaluator that keeps what it has computed."""
    store = Store(work)
    store.make()
    label = code.prepare()

    def evaluate(atoms: Atoms) -> Atoms:
        key = key_of(code.identity(atoms))
        if not store.has(key):
            folder = store.running(key)
            folder.mkdir(exist_ok=True)
            frame = label(atoms, folder)
            store.put(key, frame)
            print(
                f"{key}: {frame.get_potential_energy():.6f} eV, {frame.info['label_seconds']:.0f} s",
                flush=True,
            )
        return store.get(key)

    return evaluate


def main() -> None:
    """Compute what is asked for and write it beside this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["phase1", "phonons", "molecule"])
    parser.add_argument("--work", type=Path, required=True, help="folder for what CP2K has computed")
    parser.add_argument("--command", default="", help="how CP2K is started; cp2k.psmp by default")
    options = parser.parse_args()
    # the molecule at Gamma; the crystal with the 2 x 2 x 2 points of the training data, at every size
    k_length = quantities.BOX if options.what == "molecule" else 9.0
    code = parse_code("cp2k", command=options.command, with_wannier=False, k_length=k_length, timeout=7200.0)
    evaluate, guide = kept(code, options.work), model_evaluate(GUIDE)
    frames = getattr(quantities, options.what)(evaluate, guide)
    for frame in frames:
        frame.info |= {"label_code": code.name}
        frame.info.pop("label_seconds", None)
    write_frames(HERE / f"{options.what}.xyz", frames)


if __name__ == "__main__":
    main()
