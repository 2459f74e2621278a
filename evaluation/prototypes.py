"""One vector an image, from embeddings and predicted saliency."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import InputError

Foreground = Literal["logit", "probability"]
Pooling = Literal["weighted", "normalized"]


@dataclass(frozen=True)
class PrototypeConfig:
    """How an image's vector is taken.

    Attributes:
        foreground: pixels whose saliency logit (as published) or probability is above `threshold`.
        threshold: see `foreground`.
        pooling: weighted, Σ logit × embedding (as published), or normalized, Σ of the pixels'
            L2-normalised embeddings.
    """

    foreground: Foreground = "logit"
    threshold: float = 0.5
    pooling: Pooling = "weighted"

    def __post_init__(self) -> None:
        if self.foreground not in ("logit", "probability"):
            raise InputError(f"--foreground is {self.foreground!r}; it can be logit or probability")
        if self.pooling not in ("weighted", "normalized"):
            raise InputError(f"--pooling is {self.pooling!r}; it can be weighted or normalized")


def foreground_of(saliency: Tensor, config: PrototypeConfig) -> Tensor:
    """Predicted object pixels, bool [B, H, W], from saliency logits [B, H, W]."""
    values = saliency if config.foreground == "logit" else saliency.sigmoid()
    return values > config.threshold


def image_prototypes(
    embeddings: Tensor, saliency: Tensor, config: PrototypeConfig
) -> tuple[Tensor, Tensor]:
    """Vectors [B, D] of unit length, zero where an image has no foreground, and the foreground.

    Args:
        embeddings: [B, D, H, W], not normalised.
        saliency: logits [B, H, W].
        config: how.
    """
    foreground = foreground_of(saliency, config)
    if config.pooling == "weighted":
        weight = saliency * foreground
    else:
        embeddings = F.normalize(embeddings, dim=1)
        weight = foreground.to(embeddings.dtype)
    return F.normalize(torch.einsum("bdhw,bhw->bd", embeddings, weight), dim=1), foreground
