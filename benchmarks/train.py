"""What training costs: a sharpness-aware step, waiting for data, and the shipped demo.

Steps are timed inside nequip's own trainer, on the data and the network of examples/ammonia/small.yaml, one
thread, plain and sharpness-aware steps in turn, so that a busy machine is busy for both; medians. Waiting is
the time from the end of one step to the beginning of the next, within an epoch, over all epochs, the first
included. The demo is trained for a few epochs as ``nnqmd train`` does it, on one thread, and the time of all
its epochs is extrapolated from these (without the first, plus the start); --full trains all of them instead.

    python benchmarks/train.py [--epochs 6] [--demo-epochs 8] [--full] [--json FILE]

``compiled_over_eager`` is the time of a plain step with ``compile: true`` beside that without. Steps that are
not compiled are those of ``sam_step_ratio`` and ``loader_wait_share``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from hydra.utils import instantiate
from nequip.utils.global_state import set_global_state
from omegaconf import OmegaConf

from nnqmd_server.potentials.compiled import find_compiler
from nnqmd_server.training import train
from nnqmd_server.training.config import read_config
from nnqmd_server.training.expansion import expand

DEMO = Path(__file__).resolve().parents[1] / "examples/ammonia/small.yaml"


class Clock(lightning.Callback):
    """When steps begin and end."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.epochs: list[int] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """A step begins."""
        self.begun.append(time.perf_counter())
        self.epochs.append(trainer.current_epoch)

    def on_train_batch_end(self, *_: Any) -> None:
        """A step has ended."""
        self.ended.append(time.perf_counter())


def time_steps(directory: Path, epochs: int, matmul: bool, compiled: bool) -> dict[str, float]:
    """Milliseconds of plain and sharpness-aware steps, in turn, and the share of time between steps."""
    set_global_state()
    config = read_config(DEMO)
    full = expand(replace(config, training=replace(config.training, sam_every=2, compile=compiled)), epochs)
    data = instantiate(full["data"], _recursive_=False)
    statistics = data.get_statistics("train")
    OmegaConf.register_new_resolver("training_data_stats", lambda name: statistics[name], replace=True)
    settings = OmegaConf.to_container(OmegaConf.create(full)["training_module"], resolve=True)
    settings["cpu_matmul"] = matmul
    module = instantiate(settings, _recursive_=False, _convert_="all", num_datasets=data.num_datasets)
    clock = Clock()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, inference_mode=False,
        callbacks=[clock], default_root_dir=directory,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    begun, ended = np.array(clock.begun), np.array(clock.ended)
    length = ended - begun
    steps = np.arange(len(length))
    warm = steps >= 6
    same = np.diff(clock.epochs) == 0
    waited = (begun[1:] - ended[:-1])[same].sum()
    return {
        "plain_ms": 1e3 * float(np.median(length[warm & (steps % 2 == 1)])),
        "sam_ms": 1e3 * float(np.median(length[warm & (steps % 2 == 0)])),
        "wait_share": float(waited / (waited + length.sum())),
        "first_s": float(length[0]),
    }


def demo_minutes(directory: Path, epochs: int, all_epochs: int) -> tuple[float, float]:
    """Minutes for all epochs of the demo, from those of a few; seconds per epoch."""
    os.environ["OMP_NUM_THREADS"] = "1"
    plan = train.prepare(DEMO, directory / "demo", epochs)
    begun = time.perf_counter()
    found = train.fit(plan)
    whole = time.perf_counter() - begun
    each = (found[-1].seconds - found[0].seconds) / (len(found) - 1)
    start = whole - found[-1].seconds
    return (start + found[0].seconds + each * (all_epochs - 1)) / 60, each


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=6, help="epochs of timed steps; 0 leaves them out")
    parser.add_argument("--demo-epochs", type=int, default=8, help="epochs of the demo; 0 leaves it out")
    parser.add_argument("--full", action="store_true", help="train the demo to its end")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    total = read_config(DEMO).training.epochs
    here = Path.cwd()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        plan = train.prepare(DEMO, room / "data", 1)
        os.chdir(plan.directory)
        kinds = [("allegro", False, False), ("matmul", True, False)]
        if find_compiler():
            kinds.append(("matmul, compiled", True, True))
        for name, matmul, compiled in kinds if options.epochs else ():
            found = time_steps(room, options.epochs, matmul, compiled)
            ratio = found["sam_ms"] / found["plain_ms"]
            print(
                f"products by {name}: plain step {found['plain_ms']:.1f} ms, sharpness-aware"
                f" {found['sam_ms']:.1f} ms, ratio {ratio:.3f}; waiting {100 * found['wait_share']:.2f} %;"
                f" the first step {found['first_s']:.1f} s",
                flush=True,
            )
            if compiled:
                figures["compiled_over_eager"] = found["plain_ms"] / figures["plain_step_ms_matmul"]
                continue
            figures[f"plain_step_ms_{name}"] = found["plain_ms"]
            if matmul:
                figures |= {"sam_step_ratio": ratio, "loader_wait_share": found["wait_share"]}
        os.chdir(here)
        if options.full or options.demo_epochs:
            epochs = total if options.full else options.demo_epochs
            minutes, each = demo_minutes(room, epochs, total)
            how = "trained" if options.full else f"extrapolated from {epochs} epochs"
            print(f"demo, {total} epochs on one core: {minutes:.1f} min ({each:.2f} s per epoch; {how})")
            figures["demo_minutes"] = minutes
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
