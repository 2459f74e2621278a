"""From masks to what learns: the proposals that count, their pixels, weights and prototypes."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.sample import IGNORE
from trainer.pixels import upsample_at

_IDS = 256


@dataclass(frozen=True)
class QueryPixels:
    """Pixels of one rank's query views that are contrasted.

    Attributes:
        index: int64 [N], in the flattened masks [B·H·W].
        target: int64 [N], row of the rank's proposals.
        weight: [N], how many pixels of its proposal each stands for; 1 without a cap.
        counts: int64 [M], all query pixels of each proposal.
    """

    index: Tensor
    target: Tensor
    weight: Tensor
    counts: Tensor


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
    enough[:, [0, IGNORE]] = False
    return enough.nonzero()


def proposal_of_pixel(masks: Tensor, proposals: Tensor) -> Tensor:
    """Row of `proposals` [M, 2] that each pixel of `masks` is in, −1 if none: [B, H, W]."""
    table = torch.full((len(masks), _IDS), -1, dtype=torch.int64, device=masks.device)
    table[proposals[:, 0], proposals[:, 1]] = torch.arange(len(proposals), device=masks.device)
    return table.gather(1, masks.flatten(1).long()).view(masks.shape)


def mask_prototypes(features: Tensor, masks: Tensor, proposals: Tensor) -> Tensor:
    """Sum of a proposal's L2-normalised pixel embeddings, normalised again (section 3.2).

    Args:
        features: [B, D, h, w], not necessarily normalised; upsampled at the pixels that count.
        masks: uint8 [B, H, W].
        proposals: int64 [M, 2], (sample, id), as `matched_proposals` gives them.

    Returns:
        [M, D], unit length.
    """
    row = proposal_of_pixel(masks, proposals).flatten()
    inside = (row >= 0).nonzero().squeeze(1)
    size = (masks.shape[1], masks.shape[2])
    pixels = F.normalize(upsample_at(features, size, inside), dim=1)
    sums = pixels.new_zeros((len(proposals), features.shape[1]))
    return F.normalize(sums.index_add_(0, row[inside], pixels), dim=1)


def query_pixels(
    masks: Tensor, proposals: Tensor, most: int = 0, offsets: Tensor | None = None
) -> QueryPixels:
    """The pixels inside proposals, or of each proposal evenly spread ones (systematic sampling).

    Pixel j of n is taken where a grid of `most` points with a random offset falls on it, which
    happens with probability most / n, so that its weight n / most makes every sum unbiased
    (Madow and Madow, 1944).

    Args:
        masks: uint8 [B, H, W].
        proposals: int64 [M, 2].
        most: pixels of a proposal; 0 takes all.
        offsets: float64 [B], uniform in 0…1, of each image; needed with `most`.
    """
    row = proposal_of_pixel(masks, proposals).flatten()
    index = (row >= 0).nonzero().squeeze(1)
    target = row[index]
    counts = torch.bincount(target, minlength=len(proposals))
    if most == 0:
        return QueryPixels(index, target, torch.ones_like(target, dtype=torch.float32), counts)
    assert offsets is not None
    taken = counts.clamp_max(most)
    spacing = counts.double() / taken.clamp_min(1)
    chosen = torch.arange(len(proposals), device=masks.device).repeat_interleave(taken)
    number = torch.arange(len(chosen), device=masks.device) - (taken.cumsum(0) - taken)[chosen]
    offset = offsets.to(masks.device)[proposals[:, 0]][chosen]
    within = ((number + offset) * spacing[chosen]).long().minimum(counts[chosen] - 1)
    by_proposal = index[target.argsort(stable=True)]  # the pixels of each proposal stand together
    index = by_proposal[(counts.cumsum(0) - counts)[chosen] + within]
    return QueryPixels(index, chosen, spacing[chosen].float(), counts)


def on_grid(masks: Tensor, stride: int) -> Tensor:
    """Masks [B, H, W] with everything ignored but one pixel of every `stride` × `stride`."""
    if stride == 1:
        return masks
    sparse = torch.full_like(masks, IGNORE)
    lines = slice(stride // 2, None, stride)
    sparse[:, lines, lines] = masks[:, lines, lines]
    return sparse


def _pixel_counts(masks: Tensor) -> Tensor:
    """Pixels of each id in each mask: int64 [B, 256]."""
    offset = torch.arange(len(masks), device=masks.device)[:, None] * _IDS
    ids = masks.flatten(1).long() + offset
    return torch.bincount(ids.flatten(), minlength=len(masks) * _IDS).view(-1, _IDS)
