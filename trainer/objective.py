"""From two views' outputs to the two losses: the only place where ranks and losses meet.

Both losses are those of the global batch: in-batch prototypes, class weights, pixel counts and
means are taken over all ranks, so that neither loss nor gradient depends on the number of ranks.
What the masks alone decide comes first (`choose_pixels`), so that the bank can set out before the
encoder runs; the losses come after it (`contrast_views`).
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Batch
from data_pipeline.order import generator
from trainer.attention import KeyChunk
from trainer.distributed import Ranks, all_gather_rows, gather_integers
from trainer.loss import class_weights, contrast_pixels, saliency_counts, saliency_loss
from trainer.memory_bank import ShardedMemoryBank
from trainer.model import PixelOutput, upsample
from trainer.pixels import upsample_at
from trainer.proposals import (
    QueryPixels,
    mask_prototypes,
    matched_proposals,
    on_grid,
    query_pixels,
)
from trainer.settings import LossConfig

_OFFSETS = 16  # stream of the generator, apart from the pipeline's


@dataclass(frozen=True)
class ChosenPixels:
    """What is contrasted in one micro-batch, known from the masks alone.

    Attributes:
        proposals: int64 [M, 2], (image, id), of this rank.
        pixels: this rank's N query pixels.
        weights: [N], of each pixel in the mean over the global batch.
        prototypes_of_ranks, pixels_of_ranks: M and N of every rank.
        sample_ids: int64 [P], of the prototypes of all ranks.
        shares: [P], of each prototype's pixels among all ranks' pixels, before any cap.
        saliency_totals: [2], background and object pixels of the global batch.
    """

    proposals: Tensor
    pixels: QueryPixels
    weights: Tensor
    prototypes_of_ranks: list[int]
    pixels_of_ranks: list[int]
    sample_ids: Tensor
    shares: Tensor
    saliency_totals: Tensor


class Losses(NamedTuple):
    """Scalars of the global batch.

    Attributes:
        total: what this rank differentiates: W times its part, since engines average gradients.
        contrastive, saliency: this rank's part, detached; their sum over the ranks is the loss.
        correct, scored: pixels nearest to their own prototype, and looked at, on this rank.
        positive, hardest: sums over those pixels: cosine to the right prototype, and to the
            nearest other key.
        same_image: this rank's part of the share of bank entries that are of a pixel's own image.
        prototypes: of the global batch.
    """

    total: Tensor
    contrastive: Tensor
    saliency: Tensor
    correct: Tensor
    scored: int
    positive: Tensor
    hardest: Tensor
    same_image: Tensor
    prototypes: int


def choose_pixels(
    batch: Batch, ranks: Ranks, config: LossConfig, seed: int = 0, first_position: int = 0
) -> ChosenPixels:
    """Proposals, query pixels and weights of one micro-batch; two small collectives.

    Args:
        batch: this rank's part.
        ranks: of the global batch.
        config: of the losses.
        seed, first_position: of the run, and of this rank's part in the endless order of samples;
            which pixels a cap leaves depends on them alone.
    """
    proposals = matched_proposals(batch.query_mask, batch.key_mask, config.min_proposal_share)
    offsets = None
    if config.pixels_per_mask:
        positions = range(first_position, first_position + len(batch.sample_id))
        draws = [generator(seed, _OFFSETS, 0, position).random() for position in positions]
        offsets = torch.tensor(draws, dtype=torch.float64)
    masks = on_grid(batch.query_mask, config.pixel_stride)
    pixels = query_pixels(masks, proposals, config.pixels_per_mask, offsets)

    mine = proposals.new_tensor([len(proposals), len(pixels.index)])
    mine = torch.cat([mine, saliency_counts(batch.query_mask)])
    by_rank = gather_integers(mine, ranks)
    num_prototypes, num_pixels, background, objects = map(list, zip(*by_rank, strict=True))
    described = torch.stack([batch.sample_id[proposals[:, 0]], pixels.counts], 1)
    sample_ids, counts = all_gather_rows(described, num_prototypes, ranks).unbind(1)

    wide = counts.double()
    class_weight = class_weights(wide) if config.balance_classes else torch.ones_like(wide)
    normaliser = (wide * class_weight).sum().clamp_min(torch.finfo(wide.dtype).tiny)
    first_row = sum(num_prototypes[: ranks.rank])
    weights = class_weight[first_row + pixels.target] * pixels.weight / normaliser
    return ChosenPixels(
        proposals,
        pixels,
        weights,
        num_prototypes,
        num_pixels,
        sample_ids,
        wide / wide.sum().clamp_min(1),
        wide.new_tensor([sum(background), sum(objects)]),
    )


def contrast_views(
    query: PixelOutput,
    key: PixelOutput,
    batch: Batch,
    chosen: ChosenPixels,
    bank: ShardedMemoryBank,
    ranks: Ranks,
    config: LossConfig,
) -> Losses:
    """Both losses of one micro-batch; its prototypes enter the bank afterwards.

    Args:
        query: outputs for `batch.query_image`, with gradient.
        key: outputs of the momentum encoder for `batch.key_image`.
        batch: this rank's part.
        chosen: from its masks.
        bank: its chunks are awaited here; `prefetch` may have been called before.
        ranks: of the global batch. Every rank takes part in every collective, also without pixels.
        config: of the losses.
    """
    size = (batch.query_mask.shape[1], batch.query_mask.shape[2])
    proposals, pixels = chosen.proposals, chosen.pixels
    with torch.no_grad():
        own = mask_prototypes(key.embedding, batch.key_mask, proposals)
        prototypes = all_gather_rows(own, chosen.prototypes_of_ranks, ranks)
    queries = F.normalize(upsample_at(query.embedding, size, pixels.index), dim=1)

    # other ranks' prototypes are never right for this rank's pixels: keys like the bank's
    first = sum(chosen.prototypes_of_ranks[: ranks.rank])
    others = torch.cat([prototypes[:first], prototypes[first + len(own) :]])
    sample_ids = None
    if bank.config.mask_same_image:
        sample_ids = batch.sample_id[proposals[pixels.target, 0]]
    entries = bank.parts(queries.detach(), sample_ids, 1 / config.temperature)
    contrast = contrast_pixels(
        queries,
        pixels.target,
        own,
        itertools.chain([KeyChunk(others)], entries),
        config.temperature,
        chosen.weights.to(queries.dtype),
        sample_ids,
        bank.precision,
    )
    logits = upsample(query.saliency, size)[:, 0]
    saliency = saliency_loss(logits, batch.query_mask, chosen.saliency_totals)
    same_image = bank.same_sample_share(chosen.sample_ids, chosen.shares)
    bank.enqueue(prototypes, chosen.sample_ids)
    return Losses(
        total=ranks.world_size * (contrast.loss + config.saliency_weight * saliency),
        contrastive=contrast.loss.detach(),
        saliency=saliency.detach(),
        correct=(contrast.positive > contrast.hardest).sum(),
        scored=len(contrast.positive),
        positive=contrast.positive.sum(),
        hardest=contrast.hardest.sum(),
        same_image=same_image,
        prototypes=len(prototypes),
    )
