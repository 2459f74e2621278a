"""The momentum encoder that embeds the key views (He et al., MoCo, CVPR 2020, section 3.2)."""

import copy

import torch

from trainer.model import PixelEncoder


def make_momentum_encoder(encoder: PixelEncoder) -> PixelEncoder:
    """A copy of `encoder` without gradients; its batch norms go their own way."""
    return copy.deepcopy(encoder).requires_grad_(False)


@torch.no_grad()
def update_momentum(momentum_encoder: PixelEncoder, encoder: PixelEncoder, m: float) -> None:
    """θ_k ← m θ_k + (1 − m) θ_q; batch norm statistics are not averaged."""
    torch._foreach_lerp_(list(momentum_encoder.parameters()), list(encoder.parameters()), 1 - m)
