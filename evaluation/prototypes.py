"""One vector an image, from embeddings and predicted saliency."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import InputError
from data_pipeline.resize import resize_nearest
from data_pipeline.sample import IGNORE
from data_pipeline.whole_images import WholeImage
from trainer.model import upsample

Foreground = Literal["logit", "probability", "mask"]
Pooling = Literal["weighted", "normalized"]
# what a network without a saliency head can do where data sets have masks
GIVEN_MASKS = "--foreground mask uses the saliency masks of the data set instead"


@dataclass(frozen=True)
class PrototypeConfig:
    """How an image's vector is taken.

    Attributes:
        foreground: pixels whose saliency logit (as published) or probability is above `threshold`,
            or those of the data set's own saliency masks, for networks that predict none.
        threshold: see `foreground`.
        pooling: weighted, Σ logit × embedding (as published), or normalized, Σ of the pixels'
            L2-normalised embeddings.
    """

    foreground: Foreground = "logit"
    threshold: float = 0.5
    pooling: Pooling = "weighted"

    def __post_init__(self) -> None:
        if self.foreground not in ("logit", "probability", "mask"):
            raise InputError(
                f"--foreground is {self.foreground!r}; it can be logit, probability or mask"
            )
        if self.pooling not in ("weighted", "normalized"):
            raise InputError(f"--pooling is {self.pooling!r}; it can be weighted or normalized")


def foreground_of(saliency: Tensor, config: PrototypeConfig) -> Tensor:
    """Object pixels, bool [B, H, W], from saliency logits [B, H, W], or a mask's 0 and 1."""
    if config.foreground == "mask":
        return saliency > 0
    values = saliency if config.foreground == "logit" else saliency.sigmoid()
    return values > config.threshold


def image_prototypes(
    embeddings: Tensor, saliency: Tensor, config: PrototypeConfig
) -> tuple[Tensor, Tensor]:
    """Vectors [B, D] of unit length, zero where an image has no foreground, and the foreground.

    Embeddings at the stride stand for what they are when they are upsampled to the saliency's size.

    Args:
        embeddings: [B, D, h, w], not normalised.
        saliency: logits [B, H, W], or the data set's masks, 0 and 1.
        config: how.
    """
    foreground = foreground_of(saliency, config)
    if config.pooling == "weighted":
        weight = saliency * foreground
        # Σ w · (U e) = Σ (Uᵀ w) · e: the weights go to the stride, instead of D channels from there
        height, width = embeddings.shape[2:]
        weight = _resampling(weight, 1, height).mT @ weight @ _resampling(weight, 2, width)
        embeddings = embeddings.to(weight.dtype)
    else:
        embeddings = F.normalize(upsample(embeddings, _size(saliency)), dim=1)
        weight = foreground.to(embeddings.dtype)
    return F.normalize(torch.einsum("bdhw,bhw->bd", embeddings, weight), dim=1), foreground


def _resampling(weight: Tensor, axis: int, small: int) -> Tensor:
    """The matrix [large, small] of `upsample` along an axis of `weight`."""
    each = torch.eye(small, dtype=weight.dtype, device=weight.device)[None]
    matrix: Tensor = F.interpolate(each, weight.shape[axis], mode="linear", align_corners=False)
    return matrix[0].mT


def _size(saliency: Tensor) -> tuple[int, int]:
    return saliency.shape[1], saliency.shape[2]


def saliency_masks(images: list[WholeImage], size: int) -> Tensor:
    """The data set's saliency masks, float32 [B, S, S]: 1 on any object, 0 elsewhere.

    Raises:
        InputError: an image has none.
    """
    masks = []
    for image in images:
        if image.mask is None:
            raise InputError(
                f"{image.key} has no saliency mask, which --foreground mask takes; give --masks, "
                "or shards that were built with masks"
            )
        objects = torch.tensor((image.mask > 0) & (image.mask < IGNORE)).to(torch.uint8)
        masks.append(resize_nearest(objects, (size, size)).float())
    return torch.stack(masks)
