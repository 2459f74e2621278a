"""From two views' outputs to the two losses: the only place where ranks and losses meet.

Both losses are those of the global batch: in-batch prototypes, class weights, pixel counts and
means are taken over all ranks, so that neither loss nor gradient depends on the number of ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from trainer.distributed import Ranks, all_gather_rows, all_reduce_sum, gather_counts
from trainer.loss import (
    class_weights,
    mask_prototypes,
    matched_proposals,
    pixel_contrastive_loss,
    proposal_of_pixel,
    saliency_counts,
    saliency_loss,
    top1_accuracy,
)
from trainer.memory_bank import ShardedMemoryBank
from trainer.model import PixelOutput, upsample


@dataclass(frozen=True)
class LossConfig:
    """The objective.

    Attributes:
        temperature: T of the softmax over prototypes.
        balance_classes: weigh pixels by 1/ln(1.02 + share of their prototype).
        saliency_weight: of loss 2 in the sum.
        min_proposal_share: least share of a view's pixels for a proposal to count.
    """

    temperature: float = 0.5
    balance_classes: bool = True
    saliency_weight: float = 1.0
    min_proposal_share: float = 0.0025

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(f"loss.temperature is {self.temperature}; it must be above 0")
        if self.saliency_weight < 0 or not 0 <= self.min_proposal_share < 1:
            raise InputError("loss.saliency_weight must be ≥ 0, loss.min_proposal_share in 0…1")


class Losses(NamedTuple):
    """Scalars of the global batch.

    Attributes:
        total: what this rank differentiates: W times its part, since engines average gradients.
        contrastive, saliency: this rank's part, detached; their sum over the ranks is the loss.
        correct, scored: pixels nearest to their own prototype, and looked at, on this rank.
        prototypes: of the global batch.
    """

    total: Tensor
    contrastive: Tensor
    saliency: Tensor
    correct: Tensor
    scored: int
    prototypes: int


def contrast_views(
    query: PixelOutput,
    key: PixelOutput,
    batch: Batch,
    bank: ShardedMemoryBank,
    ranks: Ranks,
    config: LossConfig,
) -> Losses:
    """Both losses of one micro-batch; its prototypes enter the bank afterwards.

    Args:
        query: outputs for `batch.query_image`, with gradient.
        key: outputs of the momentum encoder for `batch.key_image`.
        batch: this rank's part.
        bank: its chunks are awaited here; `prefetch` may have been called before.
        ranks: of the global batch. Every rank takes part in every collective, also without pixels.
        config: of the losses.
    """
    size = (batch.query_mask.shape[1], batch.query_mask.shape[2])
    proposals = matched_proposals(batch.query_mask, batch.key_mask, config.min_proposal_share)
    with torch.no_grad():
        own = mask_prototypes(upsample(key.embedding, size), batch.key_mask, proposals)
        counts = gather_counts(len(own), ranks)
        prototypes = all_gather_rows(own, counts, ranks)

    row = proposal_of_pixel(batch.query_mask, proposals).flatten()
    inside = (row >= 0).nonzero().squeeze(1)
    targets = row[inside] + sum(counts[: ranks.rank])
    embeddings = upsample(query.embedding, size).movedim(1, -1).flatten(0, 2)
    queries = F.normalize(embeddings[inside], dim=1)

    pixels = torch.bincount(targets, minlength=len(prototypes))
    totals = all_reduce_sum(torch.cat([saliency_counts(batch.query_mask), pixels]), ranks)
    weights = torch.ones_like(totals[2:], dtype=queries.dtype)
    if config.balance_classes:
        weights = class_weights(totals[2:].to(queries.dtype))
    normaliser = (totals[2:] * weights).sum().clamp_min(torch.finfo(weights.dtype).tiny)

    bank_keys = [keys.to(queries.dtype) for keys, _ in bank.chunks()]
    contrastive = pixel_contrastive_loss(
        queries, targets, prototypes, bank_keys, config.temperature, weights[targets] / normaliser
    )
    logits = upsample(query.saliency, size)[:, 0]
    saliency = saliency_loss(logits, batch.query_mask, totals[:2])
    correct, scored = top1_accuracy(queries, targets, torch.cat([prototypes, *bank_keys]))
    sample_ids = batch.sample_id[proposals[:, 0]]
    bank.enqueue(own, sample_ids, counts)
    total = ranks.world_size * (contrastive + config.saliency_weight * saliency)
    return Losses(total, contrastive.detach(), saliency.detach(), correct, scored, len(prototypes))
