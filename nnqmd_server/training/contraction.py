"""Allegro's tensor product as matrix products while it is trained on a CPU.

Allegro multiplies the outer product of its inputs with the weights and sums: on a GPU such chains are fused,
on a CPU the large intermediate array goes through memory in every pass. The same sum as a batched matrix
product, one matrix per channel, needs no such array. Weights, checkpoints and packaged models are Allegro's
own.
"""

from __future__ import annotations

import torch
from allegro.nn._strided._contract import Contracter


class MatmulContracter(Contracter):
    """Allegro's tensor product; takes the place of its class while a training runs (`on`, `off`)."""

    def _contract_conv(self, x1: torch.Tensor, x2: torch.Tensor, idxs: torch.Tensor) -> torch.Tensor:
        if not self.path_channel_coupling:
            return super()._contract_conv(x1, x2, idxs)
        x2 = torch.index_select(x2, 0, idxs)
        weights = torch.einsum(self._weight_w3j_einstr, self.weights, self.w3j)
        pairs = x1 * x2 if self.w3j_is_ij_diagonal else (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(2)
        # (channel, edge, pair) x (channel, pair, out)
        out = torch.bmm(pairs.transpose(0, 1), weights.reshape(self.mul, -1, self.base_dim_out))
        return out.transpose(0, 1)


def on(model: torch.nn.Module) -> int:
    """Let a model's tensor products be matrix products; returns how many there are."""
    return _swap(model, Contracter, MatmulContracter)


def off(model: torch.nn.Module) -> int:
    """Undo `on`."""
    return _swap(model, MatmulContracter, Contracter)


def _swap(model: torch.nn.Module, old: type, new: type) -> int:
    found = [module for module in model.modules() if type(module) is old]
    for module in found:
        module.__class__ = new
    return len(found)
