"""The momentum encoder that embeds the key views (He et al., MoCo, CVPR 2020, section 3.2)."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.model import PixelEncoder


def make_momentum_encoder(encoder: PixelEncoder) -> PixelEncoder:
    """A copy of `encoder` without gradients; its batch norms go their own way."""
    return copy.deepcopy(encoder).requires_grad_(False)


@torch.no_grad()
def update_momentum(averages: Iterable[Tensor], weights: Iterable[Tensor], m: float) -> None:
    """θ_k ← m θ_k + (1 − m) θ_q; batch norm statistics are not averaged.

    Args:
        averages: θ_k, float32: with m = .999 a step is less than what 16 bits can tell apart.
        weights: θ_q, one for each of them, of the same shape.
        m: the momentum.
    """
    torch._foreach_lerp_(list(averages), list(weights), 1 - m)
