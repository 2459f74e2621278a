"""The two losses of MaskContrast (ICCV 2021, section 3.3): tensors in, tensors out, no ranks.

The contrastive loss takes one pass over the keys and never holds N×K. Let s⁺ = q·k⁺/T be the logit
of the right prototype, lse⁻ = log Σ exp(q·k/T) over all *other* keys and O⁻ their softmax-weighted
mean, which is attention with keys as values. Then

    loss = softplus(lse⁻ − s⁺)        dloss/dq = σ(lse⁻ − s⁺) · (O⁻ − k⁺) / T

so the forward pass already knows the gradient, and neither difference cancels when the right
prototype's probability nears 1, which is why 16-bit keys do. Keys carry no gradient.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.sample import IGNORE
from trainer.attention import (
    NOTHING,
    KeyPart,
    attend_chunks,
    attend_except,
    merge_,
    probed_rows,
    row_blocks,
)


class Contrast(NamedTuple):
    """The contrastive loss and what it saw of evenly spaced pixels, a few hundred at the most.

    Attributes:
        loss: scalar, attached to the queries.
        positive, hardest: [n], cosine to the right prototype and to the nearest other key; of
            pixels that have another key.
    """

    loss: Tensor
    positive: Tensor
    hardest: Tensor


def class_weights(pixel_counts: Tensor) -> Tensor:
    """1 / ln(1.02 + p), p a prototype's share of all query pixels [P] (ENet, section 5.2)."""
    share = pixel_counts / pixel_counts.sum().clamp_min(1)
    return 1 / torch.log(1.02 + share)


def pixel_contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    bank_chunks: Iterable[KeyPart],
    temperature: float,
    weights: Tensor,
    *,
    sample_ids: Tensor | None = None,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Weighted sum over pixels of −log softmax at the right prototype, among all keys (eq. 3).

    Args:
        queries: [N, D], unit length.
        targets: int64 [N], row of `prototypes` that is right.
        prototypes: [P, D], those that may be right: a rank's own; no gradient.
        bank_chunks: all other keys, [k, D] each, with their sample ids where same-image entries
            are to be passed over, or already attended to (`attention.py`); no gradient. Taken to
            the end also without queries, since it may hold collectives.
        temperature: T.
        weights: [N], of each pixel.
        sample_ids: int64 [N], of each pixel; keys of `bank_chunks` with the same id do not count.
        precision: of queries and keys in the products with `bank_chunks`; None is the device's
            choice (`attention.attend`). The prototypes' part is never narrower than the queries.

    Returns:
        Scalar, attached to `queries` also when N is 0.
    """
    return contrast_pixels(
        queries, targets, prototypes, bank_chunks, temperature, weights, sample_ids, precision
    ).loss


def contrast_pixels(
    queries: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    bank_chunks: Iterable[KeyPart],
    temperature: float,
    weights: Tensor,
    sample_ids: Tensor | None = None,
    precision: torch.dtype | None = None,
) -> Contrast:
    """`pixel_contrastive_loss` and what its pixels are close to; the same arguments."""
    loss, positive, hardest = _OnePassLoss.apply(
        queries, targets, prototypes, bank_chunks, temperature, weights, sample_ids, precision
    )
    return Contrast(loss, positive, hardest)


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
    positive, ignored = masks > 0, masks == IGNORE
    weight = torch.where(positive, negative_share, 1 - negative_share).masked_fill(ignored, 0)
    losses = F.binary_cross_entropy_with_logits(
        logits, positive.to(logits.dtype), weight, reduction="sum"
    )
    return losses / total


def saliency_counts(masks: Tensor) -> Tensor:
    """Background and object pixels in masks uint8 [B, H, W], without ignored ones: [2]."""
    objects = ((masks > 0) & (masks < IGNORE)).sum()
    return torch.stack([(masks == 0).sum(), objects])


class _OnePassLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        targets: Tensor,
        prototypes: Tensor,
        bank_chunks: Iterable[KeyPart],
        temperature: float,
        weights: Tensor,
        sample_ids: Tensor | None,
        precision: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.narrow = queries.dtype
        queries = queries if queries.dtype == torch.float64 else queries.float()
        prototypes, scale = prototypes.to(queries.dtype), 1 / temperature
        probe = probed_rows(len(queries))
        # of each query, what is not its rank's own prototype; then the negatives; then the gradient
        rest = attend_chunks(queries, bank_chunks, scale, sample_ids, precision)
        rows_of_prototypes = torch.arange(len(prototypes), device=queries.device)
        losses = torch.empty_like(rest.lse)
        for rows in row_blocks(queries, len(prototypes)):
            mixture, lse = rest.mixture[rows], rest.lse[rows]
            own = (queries[rows], targets[rows], prototypes, rows_of_prototypes, scale)
            merge_(mixture, lse, *attend_except(*own))
            right = prototypes[targets[rows]]
            lse -= (queries[rows] * right).sum(1) * scale
            losses[rows] = F.softplus(lse)
            mixture.sub_(right).mul_((lse.sigmoid_() * weights[rows] * scale)[:, None])
        ctx.save_for_backward(rest.mixture)
        positive, hardest = _nearest(
            queries[probe], targets[probe], prototypes, rest.hardest, scale
        )
        ctx.mark_non_differentiable(positive, hardest)
        return (weights * losses).sum(), positive, hardest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        gradient = (gradient * gradients[0]).to(ctx.narrow)
        return gradient, None, None, None, None, None, None, None


def _nearest(
    queries: Tensor, targets: Tensor, prototypes: Tensor, hardest: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Cosine to the right prototype and to the nearest other key, of queries [n] that have one."""
    if not len(queries):
        return hardest, hardest.clone()
    similarity = queries @ prototypes.T
    positive = similarity.gather(1, targets[:, None])[:, 0]
    others = similarity.scatter(1, targets[:, None], NOTHING).amax(1)
    hardest = torch.maximum(others, hardest / scale)
    there = hardest >= -2
    return positive[there], hardest[there]
