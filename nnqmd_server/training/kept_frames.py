"""Frames whose neighbour lists are made once and kept: the optimiser waits for them in one epoch only.

And the module that hands them out, in an order that an interruption does not change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from nequip.data.datamodule import NequIPDataModule
from nequip.data.dataset import ASEDataset

MOST_BYTES = 2 << 30
"""What is kept in memory at most; frames beyond are prepared anew each time."""


class KeptFrames(ASEDataset):
    """nequip's data set, whose transformed frames stay in memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        self._room = MOST_BYTES

    def __getitems__(self, indices: Iterable[int] | slice) -> list[dict[str, torch.Tensor]]:
        """The frames of these numbers, transformed."""
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        return [self._frame(int(k)) for k in indices]

    def _frame(self, k: int) -> dict[str, torch.Tensor]:
        if k not in self._kept:
            frame = self._transform(self.data_list[k])
            size = sum(v.numel() * v.element_size() for v in frame.values() if isinstance(v, torch.Tensor))
            if size > self._room:
                return frame
            self._room -= size
            self._kept[k] = frame
        return self._kept[k].copy()


class FramesModule(NequIPDataModule):
    """nequip's data module, whose order of frames goes on where a training was interrupted."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of the random generators into those that exist already.

        Lightning restores a checkpoint after it has set up the data, and nequip's module would begin again
        with the order of the first epoch.
        """
        super().load_state_dict(state_dict)
        for name in ("train_generator", "generator"):
            if hasattr(self, name):
                getattr(self, name).set_state(state_dict[f"{name}_state"])
