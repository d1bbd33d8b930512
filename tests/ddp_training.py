"""Train the module of test_training on two processes; the first writes its weights. Run by test_training.

python ddp_training.py FRAMES OUT: FRAMES is what torch.save made of a list of graphs. Each step sees two of
them, one on each process.
"""

import sys

import lightning
import torch
from nequip.data import AtomicDataDict
from nequip.train import SimpleDDPStrategy
from test_training import CLIP, RHO, training_module


class Keep(lightning.Callback):
    """Keeps the weights after the first step: later ones have amplified round-off."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 1:
            self.weights = [p.detach().clone() for p in pl_module.model.parameters()]


def main() -> None:
    frames, out = sys.argv[1:]
    torch.set_num_threads(1)
    module = training_module(rho=RHO, ema_decay=0.9)
    module.world_size = 2
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=SimpleDDPStrategy(process_group_backend="gloo"), max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=CLIP, use_distributed_sampler=False, callbacks=[keep := Keep()],
    )  # fmt: skip
    graphs = torch.load(frames, weights_only=False)
    # Lightning's own sampler shuffles whatever the loader says
    sampler = torch.utils.data.DistributedSampler(
        graphs, num_replicas=2, rank=trainer.global_rank, shuffle=False
    )
    loader = torch.utils.data.DataLoader(
        graphs, batch_size=1, sampler=sampler, collate_fn=AtomicDataDict.batched_from_list
    )
    trainer.fit(module, loader)
    weights = [p.detach().clone() for p in module.model.parameters()]
    everyone = torch.stack([w.abs().sum() for w in weights])
    torch.distributed.all_reduce(everyone, op=torch.distributed.ReduceOp.MAX)
    mine = torch.stack([w.abs().sum() for w in weights])
    assert torch.equal(everyone, mine), "the processes have different weights"
    if trainer.global_rank == 0:
        found = {"first": keep.weights, "weights": weights, "average": list(module.ema.ema_weights)}
        torch.save(found, out)


if __name__ == "__main__":
    main()
