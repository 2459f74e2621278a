"""Embeddings of chosen pixels, without the map of all of them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def upsample_at(values: Tensor, size: tuple[int, int], index: Tensor) -> Tensor:
    """What `model.upsample` gives at some pixels: bilinear, corners not aligned.

    The map of all pixels, 4·D bytes each, is never held forward; backward holds it once, since the
    gradient of a feature is a sum over its pixels, whose order must not depend on threads.

    Args:
        values: [B, C, h, w].
        size: (H, W) of the image.
        index: int64 [N], in the flattened pixels [B·H·W]; each at most once.

    Returns:
        [N, C], float32 (float64 stays).
    """
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    found: Tensor = _UpsampleAt.apply(values, size, index)
    return found


class _UpsampleAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, size: tuple[int, int], index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.size = values.shape, size
        batch, channels, height, width = values.shape
        if (height, width) == size:
            return values.movedim(1, -1).reshape(-1, channels)[index]
        column = index % size[1]
        row = torch.div(index, size[1], rounding_mode="floor")
        image = torch.div(row, size[0], rounding_mode="floor")
        top, bottom, down = _neighbours(row - image * size[0], height, size[0], values.dtype)
        left, right, across = _neighbours(column, width, size[1], values.dtype)
        top, bottom = ((image * height + line) * width for line in (top, bottom))
        corners = torch.stack([top + left, top + right, bottom + left, bottom + right], 1)
        weights = torch.stack(
            [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], 1
        )
        table = values.movedim(1, -1).reshape(batch * height * width, channels)
        return F.embedding_bag(corners, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        everywhere = gradients[0].new_zeros((batch, *ctx.size, channels))
        everywhere.view(-1, channels)[index] = gradients[0]
        everywhere = everywhere.movedim(-1, 1)
        if (height, width) == ctx.size:
            return everywhere, None, None
        gradient = torch.ops.aten.upsample_bilinear2d_backward(
            everywhere, list(ctx.size), list(ctx.shape), False
        )
        return gradient, None, None


def _neighbours(
    position: Tensor, features: int, pixels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The features before and after pixels [N] of a row, and the share of the one after."""
    place = ((position.to(dtype) + 0.5) * (features / pixels) - 0.5).clamp_min(0)
    before = place.long().clamp_max(features - 1)
    return before, (before + 1).clamp_max(features - 1), place - before
