"""Makes models of other programs and says what these programs themselves compute with them.

Called by benchmarks/potentials.py and tests/test_peer_potentials.py in that program's environment:

    PYTHON benchmarks/peer_potentials.py deepmd|mace|mattersim|metatomic|orb|sevennet|tblite FOLDER

FOLDER/structures.npz has numbers, positions [Angstrom], cells [Angstrom, rows] and offsets of some
structures. FOLDER/oracle.npz gets their energy [eV], forces [eV/Angstrom] and virial [eV] by the
program's own interface, and FOLDER/sources.json the ways in which nnqmd can serve the same model, and
the versions.

deepmd    pip install deepmd-kit (see docs/potentials.md), ase. se_e2_a, 300 steps of training on
          FOLDER/train.npz (energies and forces of the ammonia data set); oracle: DeepPot.eval, one by one.
mace      pip install mace-torch torch-sim-atomistic ipi. Two layers, 16x0e+16x1o, weights as initialised
          (seed 1), float64; oracle: MACECalculator, one structure at a time.
mattersim pip install mattersim. M3GNet of two blocks, weights as initialised (seed 1), float32; oracle:
          MatterSimCalculator, one structure at a time.
metatomic pip install metatomic-torch metatomic-ase metatomic-torchsim ase ipi (Python 3.12).
          A repulsion of pairs in float64, saved as metatomic's programs save models; oracle:
          MetatomicCalculator, one structure at a time.
sevennet  pip install sevenn==0.12.1 torch-sim-atomistic==0.3.0. SevenNet-0, which the wheel of sevenn
          brings; oracle: SevenNetCalculator.
tblite    pip install tblite ase ipi. GFN2-xTB; oracle: tblite.interface.
All need numpy and pyzmq besides.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

HARTREE, BOHR = 27.211386245988, 0.529177210903
Frame = tuple[np.ndarray, np.ndarray, np.ndarray]


def frames_of(path: Path) -> list[Frame]:
    """Numbers, positions and cell of each structure."""
    data = np.load(path)
    parts = [slice(a, b) for a, b in zip(data["offsets"][:-1], data["offsets"][1:], strict=True)]
    return [(data["numbers"][p], data["positions"][p], data["cells"][k]) for k, p in enumerate(parts)]


def by_ase(calculator: object, frames: list[Frame]) -> list[tuple]:
    """Energies, forces and virials of an ASE calculator."""
    from ase import Atoms

    found = []
    for numbers, positions, cell in frames:
        atoms = Atoms(numbers, positions, cell=cell, pbc=True, calculator=calculator)
        virial = -atoms.get_stress(voigt=False) * atoms.get_volume()
        found.append((atoms.get_potential_energy(), atoms.get_forces(), virial))
    return found


def first_structure(folder: Path, frames: list[Frame]) -> Path:
    """A file with the first structure, for i-PI's drivers, which learn the elements from it."""
    numbers, positions, cell = frames[0]
    a, b, c = np.linalg.norm(cell, axis=1)
    lines = [f"{'N' if n == 7 else 'H'} {x} {y} {z}" for n, (x, y, z) in zip(numbers, positions, strict=True)]
    comment = f"# CELL(abcABC): {a} {b} {c} 90 90 90 positions{{angstrom}} cell{{angstrom}}"
    (folder / "first.xyz").write_text("\n".join([str(len(lines)), comment, *lines]) + "\n")
    return folder / "first.xyz"


def deepmd(folder: Path, frames: list[Frame]) -> tuple[list[tuple], dict[str, str], list[str]]:
    """Train a small model, freeze it, evaluate it."""
    from deepmd.infer import DeepPot

    model = folder / "frozen.pth"
    if not model.is_file():
        data = np.load(folder / "train.npz")
        system = folder / "system"
        (system / "set.000").mkdir(parents=True, exist_ok=True)
        (system / "type_map.raw").write_text("N\nH\n")
        np.savetxt(system / "type.raw", np.where(data["numbers"] == 7, 0, 1), fmt="%d")
        for name, shape in (("coord", -1), ("box", 9), ("force", -1), ("energy", 1)):
            np.save(system / f"set.000/{name}.npy", data[name].reshape(len(data["energy"]), shape))
        net = {"neuron": [8, 16], "resnet_dt": False, "seed": 1}
        settings = {
            "model": {
                "type_map": ["N", "H"],
                "descriptor": {
                    "type": "se_e2_a",
                    "rcut": 4.5,
                    "rcut_smth": 0.5,
                    "sel": [24, 72],
                    "axis_neuron": 4,
                    "precision": "float64",
                    **net,
                },
                "fitting_net": {"neuron": [24, 24], "resnet_dt": True, "seed": 1, "precision": "float64"},
            },
            "learning_rate": {
                "type": "exp",
                "start_lr": 1e-3,
                "stop_lr": 1e-5,
                "decay_steps": 50,
            },
            "loss": {
                "start_pref_e": 0.02,
                "limit_pref_e": 1,
                "start_pref_f": 1000,
                "limit_pref_f": 1,
            },
            "training": {
                "training_data": {"systems": [str(system)], "batch_size": 1},
                "numb_steps": 300,
                "seed": 1,
                "disp_freq": 100,
                "save_freq": 300,
            },
        }
        (folder / "input.json").write_text(json.dumps(settings))
        dp = [sys.executable, str(Path(sys.executable).parent / "dp"), "--pt"]
        for words in (["train", "input.json"], ["freeze", "-o", model.name]):
            subprocess.run([*dp, *words], cwd=folder, check=True)
    potential, kinds, found = DeepPot(str(model)), {7: 0, 1: 1}, []
    for numbers, positions, cell in frames:
        types = [kinds[int(z)] for z in numbers]
        energy, forces, virial = potential.eval(positions.reshape(1, -1), cell.reshape(1, 9), types)[:3]
        found.append((energy.item(), forces.reshape(-1, 3), virial.reshape(3, 3)))
    return found, {"DeepPot": f"deepmd:{model}"}, ["deepmd-kit"]


MACE_MAKER = """
import torch
from torch_sim.models.mace import MaceModel

def maker(device, model):
    return MaceModel(torch.load(model, weights_only=False), device=device, dtype=torch.float64)
"""


def mace(folder: Path, frames: list[Frame]) -> tuple[list[tuple], dict[str, str], list[str]]:
    """A model with the weights that it begins with."""
    import torch
    from mace import modules  # before e3nn 0.4.4, which torch refuses to load unless mace has told it to

    from e3nn import o3  # isort: skip
    from mace.calculators import MACECalculator

    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    network = modules.ScaleShiftMACE(
        r_max=4.5,
        num_bessel=6,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=2,
        hidden_irreps=o3.Irreps("16x0e + 16x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        atomic_energies=np.array([-1.0, -7.0]),
        avg_num_neighbors=20.0,
        atomic_numbers=[1, 7],
        correlation=2,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    model = folder / "mace.model"
    torch.save(network, model)
    (folder / "mace_maker.py").write_text(MACE_MAKER)
    first = first_structure(folder, frames)
    calculator = MACECalculator(model_paths=str(model), device="cpu", default_dtype="float64")
    sources = {
        "ASE": f"ase:mace.calculators.MACECalculator,model_paths={model},default_dtype=float64",
        "TorchSim": f"torchsim:{folder}/mace_maker.py:maker,model={model}",
        "i-PI, batched": f"ipi:mace,template={first},model={model}",
    }
    return by_ase(calculator, frames), sources, ["mace-torch", "torch-sim-atomistic", "ipi"]


MATTERSIM_MAKER = """
import torch
from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
from mattersim.forcefield.potential import MatterSimCalculator, Potential

def maker(device="cpu"):
    torch.manual_seed(1)
    network = M3Gnet(num_blocks=2, units=32, device=device)
    network.normalizer.scale *= 100.0  # forces of 0.1 eV/Angstrom
    return MatterSimCalculator(Potential(network, device=device), device=device)
"""


def mattersim(folder: Path, frames: list[Frame]) -> tuple[list[tuple], dict[str, str], list[str]]:
    """A small network with the weights that it begins with: those that are trained are downloaded."""
    (folder / "mattersim_maker.py").write_text(MATTERSIM_MAKER)
    sys.path.insert(0, str(folder))
    from mattersim_maker import maker

    return by_ase(maker(), frames), {"ASE": f"ase:{folder}/mattersim_maker.py:maker"}, ["mattersim"]


METATOMIC_MODEL = """
from typing import Dict, List, Optional

import torch
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import ModelOutput, NeighborListOptions, System


class Repulsion(torch.nn.Module):
    def requested_neighbor_lists(self) -> List[NeighborListOptions]:
        return [NeighborListOptions(cutoff=4.5, full_list=False, strict=True)]

    def forward(
        self, systems: List[System], outputs: Dict[str, ModelOutput], selected_atoms: Optional[Labels]
    ) -> Dict[str, TensorMap]:
        found: List[torch.Tensor] = []
        for system in systems:
            pairs = system.get_neighbor_list(
                NeighborListOptions(cutoff=4.5, full_list=False, strict=True)
            )
            r = (pairs.values.reshape(-1, 3) ** 2).sum(dim=1).sqrt()
            first = system.types[pairs.samples.column("first_atom").to(torch.int64)]
            second = system.types[pairs.samples.column("second_atom").to(torch.int64)]
            strength = (first * second).to(r.dtype).sqrt()
            found.append((strength * torch.exp(-r) * (1.0 - (r / 4.5) ** 2) ** 3).sum())
        block = TensorBlock(
            values=torch.stack(found).reshape(-1, 1),
            samples=Labels(["system"], torch.arange(len(systems), device=found[0].device).reshape(-1, 1)),
            components=torch.jit.annotate(List[Labels], []),
            properties=Labels(["energy"], torch.tensor([[0]], device=found[0].device)),
        )
        keys = Labels(["_"], torch.tensor([[0]], device=found[0].device))
        return {"energy": TensorMap(keys, [block])}
"""

METATOMIC_MAKER = """
from metatomic_torchsim import MetatomicModel

def maker(device, model):
    return MetatomicModel(model, device=device)
"""


def metatomic(folder: Path, frames: list[Frame]) -> tuple[list[tuple], dict[str, str], list[str]]:
    """A potential of pairs as a model file of metatomic."""
    (folder / "repulsion.py").write_text(METATOMIC_MODEL)
    (folder / "metatomic_maker.py").write_text(METATOMIC_MAKER)
    sys.path.insert(0, str(folder))
    from metatomic.torch import AtomisticModel, ModelCapabilities, ModelMetadata, ModelOutput
    from metatomic_ase import MetatomicCalculator
    from repulsion import Repulsion

    model = folder / "repulsion.pt"
    capabilities = ModelCapabilities(
        outputs={"energy": ModelOutput(unit="eV", sample_kind="system")},
        atomic_types=[1, 7],
        interaction_range=4.5,
        length_unit="angstrom",
        supported_devices=["cpu", "cuda"],
        dtype="float64",
    )
    AtomisticModel(Repulsion().eval(), ModelMetadata(name="repulsion"), capabilities).save(str(model))
    first = first_structure(folder, frames)
    sources = {
        "ASE": f"ase:metatomic_ase.MetatomicCalculator,model={model}",
        "TorchSim": f"torchsim:{folder}/metatomic_maker.py:maker,model={model}",
        "i-PI, batched": f"ipi:metatomic,template={first},model={model}",
    }
    packages = ["metatomic-torch", "metatomic-ase", "metatomic-torchsim", "torch-sim-atomistic", "ipi"]
    return by_ase(MetatomicCalculator(str(model), device="cpu"), frames), sources, packages


SEVENNET_MAKER = """
from sevenn.util import model_from_checkpoint, pretrained_name_to_path
from torch_sim.models.sevennet import SevenNetModel

def maker(device):
    return SevenNetModel(model_from_checkpoint(pretrained_name_to_path("7net-0"))[0], device=device)
"""


def sevennet(folder: Path, frames: list[Frame]) -> tuple[list[tuple], dict[str, str], list[str]]:
    """The universal model that comes with the program."""
    from sevenn.calculator import SevenNetCalculator

    (folder / "sevennet_maker.py").write_text(SEVENNET_MAKER)
    sources = {
        "ASE": "ase:sevenn.calculator.SevenNetCalculator,model=7net-0",
        "TorchSim": f"torchsim:{folder}/sevennet_maker.py:maker",
    }
    found = by_ase(SevenNetCalculator("7net-0", device="cpu"), frames)
    return found, sources, ["sevenn", "torch-sim-atomistic"]


ORB_MAKER = """
import torch
from orb_models.forcefield.atomic_system import SystemConfig
from orb_models.forcefield.calculator import ORBCalculator
from orb_models.forcefield.pretrained import orb_v3_conservative_architecture

def maker(device="cpu"):
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float32)
    config = SystemConfig(radius=6.0, max_num_neighbors=120)
    network = orb_v3_conservative_architecture(
        num_message_passing_steps=2, device=device, system_config=config
    )
    return ORBCalculator(network, device=device)
"""


def orb(folder: Path, frames: list[Frame]) -> tuple[list[tuple], dict[str, str], list[str]]:
    """A small network with the weights that it begins with: those that are trained are downloaded."""
    (folder / "orb_maker.py").write_text(ORB_MAKER)
    sys.path.insert(0, str(folder))
    from orb_maker import maker

    return by_ase(maker(), frames), {"ASE": f"ase:{folder}/orb_maker.py:maker"}, ["orb-models"]


def tblite(folder: Path, frames: list[Frame]) -> tuple[list[tuple], dict[str, str], list[str]]:
    """GFN2-xTB by tblite's own Python interface."""
    from tblite.interface import Calculator

    found = []
    for numbers, positions, cell in frames:
        calculator = Calculator(
            "GFN2-xTB", numbers, positions / BOHR, lattice=cell / BOHR, periodic=np.ones(3, dtype=bool)
        )
        calculator.set("verbosity", 0)
        answer = calculator.singlepoint()
        virial = -answer.get("virial") * HARTREE  # its "virial" is dE/d(strain)
        found.append((answer.get("energy") * HARTREE, -answer.get("gradient") * HARTREE / BOHR, virial))
    first = first_structure(folder, frames)
    sources = {
        "ASE": "ase:tblite.ase.TBLite,method=GFN2-xTB,verbosity=0",
        "i-PI, one by one": f"ipi:xtb,template={first},method=GFN2-xTB,periodic=true",
    }
    return found, sources, ["tblite", "ipi"]


PROGRAMS: dict[str, Callable] = {
    "deepmd": deepmd,
    "mace": mace,
    "mattersim": mattersim,
    "metatomic": metatomic,
    "orb": orb,
    "sevennet": sevennet,
    "tblite": tblite,
}


def main() -> None:
    """Write the oracle's answers."""
    program, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    frames = frames_of(folder / "structures.npz")
    found, sources, packages = PROGRAMS[program](folder, frames)
    energy, forces, virial = zip(*found, strict=True)
    np.savez(folder / "oracle.npz", energy=energy, forces=np.concatenate(forces), virial=virial)
    versions = {name: version(name) for name in packages}
    (folder / "sources.json").write_text(json.dumps({"sources": sources, "versions": versions}))


if __name__ == "__main__":
    main()
