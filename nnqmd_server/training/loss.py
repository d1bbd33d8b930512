"""A loss term that some batches have no labels for."""

from __future__ import annotations

import torch
from nequip.train import MeanSquaredError


class PartialMeanSquaredError(MeanSquaredError):
    """Mean squared error; zero, with a gradient of zero, where there is nothing to compare."""

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Take in a batch; from an empty one the graph alone, so that all processes have all gradients."""
        super().update(preds, target)
        if target.numel() == 0:
            self.sum = self.sum + preds.sum()

    def compute(self) -> torch.Tensor:
        """The mean, of at least one."""
        return self.sum.div(self.count.clamp(min=1))
