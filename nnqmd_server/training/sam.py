"""Sharpness-aware minimisation (the Legato of Allegro-Legato) inside nequip's trainer.

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization" (2021),
with one global L2 norm over all weights: each step goes down the gradient taken at
w + rho g/|g|, the worst nearby point to first order, instead of the one at w. The adaptive form is that of
Kwon et al., "ASAM" (2021): the neighbourhood of each weight is as wide as the weight is large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate
from nequip.train import EMALightningModule, NequIPLightningModule

from nnqmd_server.training import contraction


class _Sharpness:
    """The optimizer step of SAM, for any of nequip's Lightning modules with automatic optimisation.

    ``optimizer_step`` is the hook that nequip's own EMA module overrides. The first pass is made
    here; the second is the closure that the base optimizer runs, so that Lightning clips only the
    gradient that is used, and the moving average (next in the class order) follows the true step.
    With several ranks both gradients are those of the batch of all ranks together.

    Parameters
    ----------
    rho : float
        Length of the perturbation in weight space (dimensionless); 0 is plain training.
    adaptive : bool
        Scale the perturbation by the size of each weight; rho is then relative, and some 100 times larger.
    sam_start_epoch : int
        Epochs before this one are plain.
    sam_every : int
        Only every so many steps are sharpness-aware; the others are plain, and cost half as much.
    cpu_matmul : bool
        On a CPU, compute tensor products as matrix products while training (see `contraction`).
    """

    def __init__(
        self,
        rho: float = 0.005,
        adaptive: bool = False,
        sam_start_epoch: int = 0,
        sam_every: int = 1,
        cpu_matmul: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if rho < 0:
            raise ValueError(f"rho is a length and cannot be negative: {rho}")
        if sam_every < 1 or sam_start_epoch < 0:
            raise ValueError(f"sam_every = {sam_every} must be 1 or more, sam_start_epoch 0 or more")
        self.rho = float(rho)
        self.adaptive = bool(adaptive)
        self.sam_start_epoch = int(sam_start_epoch)
        self.sam_every = int(sam_every)
        self.cpu_matmul = bool(cpu_matmul)
        self._at_perturbed_weights = False
        # The logged loss must not count the second pass. A tuple keeps this one out of the
        # checkpoint, which then loads as nequip's own module would.
        type_names = next(iter(self.model.values())).type_names
        second = instantiate(kwargs["loss"], type_names=type_names)
        for metric in second.values():
            metric.dist_sync_on_step = True
        self._second_loss = (second,)

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        """The loss of a batch; logged and accumulated in the first pass only."""
        if not self._at_perturbed_weights:
            return super().training_step(batch, batch_idx, dataloader_idx)
        target = self.process_target(batch, batch_idx, dataloader_idx)
        loss = self._second_loss[0].to(self.device)
        # schedulers may have changed the coefficients since the last step
        loss.set_coeffs({name: entry.coeff for name, entry in self.loss.entries.items()})
        value = loss(self(batch), target, prefix="sam/")["sam/weighted_sum"]
        loss.reset()
        return value * self.world_size

    def is_sharp(self, epoch: int, step: int) -> bool:
        """Whether this step, counted from the beginning of the training, is a sharpness-aware one."""
        return self.rho > 0 and epoch >= self.sam_start_epoch and step % self.sam_every == 0

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Two gradients on one batch, one step."""
        # Lightning's count of steps is in the checkpoint, so a continued training keeps the rhythm.
        if not self.is_sharp(epoch, self.trainer.global_step):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        # Called outside the optimizer, the closure gives unclipped, rank-averaged gradients.
        first_loss = optimizer_closure()
        before = perturb(self.model, self.rho, self.adaptive)

        def second_pass() -> Any:
            self._at_perturbed_weights = True
            try:
                optimizer_closure()
            finally:
                self._at_perturbed_weights = False
                _restore(before)
            return first_loss

        super().optimizer_step(epoch, batch_idx, optimizer, second_pass)

    def on_fit_start(self) -> None:
        """Refuse what cannot be combined with two passes per step."""
        super().on_fit_start()
        if self.rho > 0 and self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "sharpness-aware minimisation needs accumulate_grad_batches = 1: both of its passes must see "
                "the same batch (use a larger batch_size instead, or rho = 0)"
            )
        if self.cpu_matmul and self.device.type == "cpu":
            contraction.on(self.model)

    def on_fit_end(self) -> None:
        """Leave the model as Allegro made it."""
        super().on_fit_end()
        contraction.off(self.model)


@torch.no_grad()
def perturb(
    model: torch.nn.Module, rho: float, adaptive: bool = False
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Move the weights to the worst point nearby, and return what they were.

    Plain: ``rho g / |g|``. Adaptive: ``rho w^2 g / | |w| g |``, products by component.

    A gradient that is zero or not finite gives no direction: the weights then stay.

    Returns
    -------
    list of (parameter, values before)
    """
    moved = [p for p in model.parameters() if p.grad is not None]
    before = [(p, p.detach().clone()) for p in moved]
    if not moved:
        return before
    slopes = [(p.abs() * p.grad if adaptive else p.grad).double() for p in moved]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in slopes]))
    if torch.isfinite(norm) and norm > 0:
        for p in moved:
            ascent = p.square() * p.grad if adaptive else p.grad
            p.add_(ascent * (rho / norm).to(p.grad.dtype))
    return before


@torch.no_grad()
def _restore(before: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    for parameter, values in before:
        parameter.copy_(values)


class SAMLightningModule(_Sharpness, NequIPLightningModule):
    """nequip's training module with sharpness-aware steps."""


class EMASAMLightningModule(_Sharpness, EMALightningModule):
    """Sharpness-aware steps and a moving average of the weights, which is what gets packaged."""
