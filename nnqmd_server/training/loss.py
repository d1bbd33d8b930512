"""A loss term that some batches have no labels for."""

from __future__ import annotations

import torch
from nequip.train import MeanSquaredError


class PartialMeanSquaredError(MeanSquaredError):
    """Mean squared error; zero, with a gradient of zero, where there is nothing to compare."""

    def compute(self) -> torch.Tensor:
        """The mean, of at least one."""
        return self.sum.div(self.count.clamp(min=1))
