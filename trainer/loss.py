"""The two losses of MaskContrast (ICCV 2021, section 3.3): tensors in, tensors out, no ranks.

The contrastive loss takes one pass over blocks of keys and never holds N×K. With
lse = log Σ_j exp(q·k_j/T) and O = Σ_j softmax_j k_j, which is attention with keys as values,

    loss = lse − q·k⁺/T        dloss/dq = (O − k⁺)/T

so the forward pass already knows the gradient. Keys carry none.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_ID = 256
_FALLBACK_ROWS = 16384  # rows at a time where there is no flash kernel that returns log-sum-exp


def matched_proposals(query_mask: Tensor, key_mask: Tensor, min_share: float) -> Tensor:
    """The proposals of which both views hold enough.

    Args:
        query_mask, key_mask: uint8 [B, H, W], proposal ids; 0 background, 255 ignore.
        min_share: least share of a view's pixels.

    Returns:
        int64 [M, 2]: (sample, id), ascending.
    """
    least = max(1.0, min_share * query_mask[0].numel())
    enough = (_pixel_counts(query_mask) >= least) & (_pixel_counts(key_mask) >= least)
    enough[:, [0, MAX_ID - 1]] = False
    return enough.nonzero()


def proposal_of_pixel(masks: Tensor, proposals: Tensor) -> Tensor:
    """Row of `proposals` [M, 2] that each pixel of `masks` is in, −1 if none: [B, H, W]."""
    table = torch.full((len(masks), MAX_ID), -1, dtype=torch.int64, device=masks.device)
    table[proposals[:, 0], proposals[:, 1]] = torch.arange(len(proposals), device=masks.device)
    return table.gather(1, masks.flatten(1).long()).view(masks.shape)


def mask_prototypes(features: Tensor, masks: Tensor, proposals: Tensor) -> Tensor:
    """Sum of a proposal's L2-normalised pixel embeddings, normalised again (section 3.2).

    Args:
        features: [B, D, H, W], not necessarily normalised.
        masks: uint8 [B, H, W].
        proposals: int64 [M, 2], (sample, id), as `matched_proposals` gives them.

    Returns:
        [M, D], unit length.
    """
    row = proposal_of_pixel(masks, proposals).flatten()
    inside = (row >= 0).nonzero().squeeze(1)
    pixels = F.normalize(features.movedim(1, -1).flatten(0, 2)[inside], dim=1)
    sums = pixels.new_zeros((len(proposals), features.shape[1]))
    return F.normalize(sums.index_add_(0, row[inside], pixels), dim=1)


def class_weights(pixel_counts: Tensor) -> Tensor:
    """1 / ln(1.02 + p), p a prototype's share of all query pixels [P] (ENet, section 5.2)."""
    share = pixel_counts / pixel_counts.sum().clamp_min(1)
    return 1 / torch.log(1.02 + share)


def pixel_contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    bank_chunks: Iterable[Tensor],
    temperature: float,
    weights: Tensor,
) -> Tensor:
    """Weighted sum over pixels of −log softmax at the right prototype, among all keys (eq. 3).

    Args:
        queries: [N, D], unit length.
        targets: int64 [N], row of `prototypes` that is right.
        prototypes: [P, D], of the whole global batch; no gradient.
        bank_chunks: [k, D] each, older prototypes; no gradient.
        temperature: T.
        weights: [N], of each pixel.

    Returns:
        Scalar, attached to `queries` also when N is 0.
    """
    loss: Tensor = _OnePassLoss.apply(
        queries, targets, prototypes, bank_chunks, temperature, weights
    )
    return loss


def saliency_loss(logits: Tensor, masks: Tensor, counts: Tensor) -> Tensor:
    """Balanced binary cross entropy, summed over this rank's pixels.

    With w the share of background pixels of the global batch, object pixels weigh w and background
    pixels 1 − w; ignored pixels weigh nothing.

    Args:
        logits: [B, H, W].
        masks: uint8 [B, H, W].
        counts: [2], background and object pixels of the global batch.

    Returns:
        Scalar: the sum divided by the number of pixels of the global batch.
    """
    total = counts.sum().clamp_min(1)
    negative_share = (counts[0] / total).to(logits.dtype)
    positive, ignored = masks > 0, masks == MAX_ID - 1
    weight = torch.where(positive, negative_share, 1 - negative_share).masked_fill(ignored, 0)
    losses = F.binary_cross_entropy_with_logits(
        logits, positive.to(logits.dtype), weight, reduction="sum"
    )
    return losses / total


def saliency_counts(masks: Tensor) -> Tensor:
    """Background and object pixels in masks uint8 [B, H, W], without ignored ones: [2]."""
    objects = ((masks > 0) & (masks < MAX_ID - 1)).sum()
    return torch.stack([(masks == 0).sum(), objects])


@torch.no_grad()
def top1_accuracy(
    queries: Tensor, targets: Tensor, keys: Tensor, max_pixels: int = 4096
) -> tuple[Tensor, int]:
    """Pixels, of at most `max_pixels` evenly spaced ones, nearest to their own prototype.

    Args:
        queries: [N, D].
        targets: int64 [N], rows of `keys`.
        keys: [K, D], prototypes first, then bank entries.

    Returns:
        How many are right, and of how many.
    """
    chosen = slice(0, len(queries), max(1, len(queries) // max_pixels))
    if not len(queries):
        return queries.new_zeros(()), 0
    nearest = (queries[chosen] @ keys.T).argmax(1)
    return (nearest == targets[chosen]).sum(), len(nearest)


class _OnePassLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        targets: Tensor,
        prototypes: Tensor,
        bank_chunks: Iterable[Tensor],
        temperature: float,
        weights: Tensor,
    ) -> Tensor:
        lse, mixture = None, None
        for keys in (prototypes, *bank_chunks):  # every rank takes every chunk, even without pixels
            if not len(keys) or not len(queries):
                continue
            block_mixture, block_lse = _attend(queries, keys, 1 / temperature)
            if lse is None or mixture is None:
                lse, mixture = block_lse, block_mixture
                continue
            mixture += torch.sigmoid(block_lse - lse)[:, None] * (block_mixture - mixture)
            lse = torch.logaddexp(lse, block_lse)
        if lse is None or mixture is None:
            ctx.save_for_backward(torch.zeros_like(queries))
            return queries.new_zeros(())
        right = prototypes[targets]
        losses = lse - (queries * right).sum(1) / temperature
        ctx.save_for_backward((mixture - right) * (weights / temperature)[:, None])
        return (weights * losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None, None


def _attend(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of queries [N, D] to keys [K, D], also values: [N, D] and log-sum-exp [N]."""
    if queries.device.type == "cpu":
        q, k = queries[None, None], keys[None, None]
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, k, 0.0, False, scale=scale
        )
        return output[0, 0], lse[0, 0]
    outputs, sums = [], []
    for rows in torch.split(queries, _FALLBACK_ROWS):
        logits = rows @ keys.T * scale
        sums.append(logits.logsumexp(1))
        outputs.append((logits - sums[-1][:, None]).exp() @ keys)
    return torch.cat(outputs), torch.cat(sums)


def _pixel_counts(masks: Tensor) -> Tensor:
    """Pixels of each id in each mask: int64 [B, 256]."""
    offset = torch.arange(len(masks), device=masks.device)[:, None] * MAX_ID
    ids = masks.flatten(1).long() + offset
    return torch.bincount(ids.flatten(), minlength=len(masks) * MAX_ID).view(-1, MAX_ID)
