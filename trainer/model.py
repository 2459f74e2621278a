"""The pixel encoder: backbone, DeepLabV3 head, and 1×1 heads for embedding and saliency."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP

from data_pipeline.errors import InputError
from trainer.backbones import BACKBONES, STAGES, build_backbone


@dataclass(frozen=True)
class ModelConfig:
    """The network and where it starts.

    Attributes:
        backbone: small, resnet18, resnet34, resnet50 or resnet101.
        embedding_dim: D of the pixel embeddings.
        decoder_channels: width of the DeepLabV3 head.
        atrous_rates: of the head's pyramid.
        dropout: of the head's pyramid.
        start: random, imagenet (torchvision's weights), or a file: MoCo v2, safetensors or a
            state dict.
        freeze: stages of the backbone without gradient, their batch norms in eval mode.
        batch_norm: plain (each rank its own statistics), sync (over all ranks), shuffle (plain,
            with the key images shuffled over the ranks: MoCo), frozen (running statistics).
        momentum: m of the momentum encoder.
    """

    backbone: str = "resnet50"
    embedding_dim: int = 32
    decoder_channels: int = 256
    atrous_rates: tuple[int, int, int] = (12, 24, 36)
    dropout: float = 0.5
    start: str = "random"
    freeze: tuple[str, ...] = ()
    batch_norm: str = "plain"
    momentum: float = 0.999

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise InputError(
                f"model.backbone is {self.backbone!r}; it can be {', '.join(BACKBONES)}"
            )
        unknown = [stage for stage in self.freeze if stage not in STAGES[self.backbone]]
        if unknown:
            raise InputError(
                f"model.freeze names {unknown[0]!r}; {self.backbone} has the stages "
                f"{', '.join(STAGES[self.backbone])}"
            )
        if self.batch_norm not in ("plain", "sync", "shuffle", "frozen"):
            raise InputError(
                f"model.batch_norm is {self.batch_norm!r}; it can be plain, sync, shuffle or frozen"
            )
        if self.embedding_dim < 1 or self.decoder_channels < 1:
            raise InputError("model.embedding_dim and model.decoder_channels must be at least 1")
        if not 0 <= self.dropout < 1 or not 0 <= self.momentum <= 1:
            raise InputError("model.dropout must be in 0…1 (1 excluded), model.momentum in 0…1")


class PixelOutput(NamedTuple):
    """Embeddings [B, D, h, w] (not normalised) and saliency logits [B, 1, h, w], at the stride."""

    embedding: Tensor
    saliency: Tensor


class PixelEncoder(nn.Module):
    """Images [B, 3, H, W] to `PixelOutput` (MaskContrast, section 3.2 and supplementary).

    Args:
        config: of the network; its start is loaded by `weights.py`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, channels = build_backbone(config.backbone)
        width = config.decoder_channels
        pyramid = ASPP(channels, list(config.atrous_rates), width)
        for module in pyramid.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
        # torchvision's DeepLabHead without its last layer, with its names
        self.decoder = nn.Sequential(
            pyramid,
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.embedding_head = nn.Conv2d(width, config.embedding_dim, 1)
        self.saliency_head = nn.Conv2d(width, 1, 1, bias=False)
        for stage in config.freeze:
            getattr(self.backbone, stage).requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Decoder features [B, C, h, w] at the stride: what the linear classifier sees."""
        features: Tensor = self.decoder(self.backbone(images))
        return features

    def forward(self, images: Tensor) -> PixelOutput:
        return self.heads(self.features(images))

    def heads(self, features: Tensor) -> PixelOutput:
        """Embedding and saliency of decoder features [B, C, h, w]."""
        return PixelOutput(self.embedding_head(features), self.saliency_head(features))

    def train(self, mode: bool = True) -> "PixelEncoder":
        """Train mode, but for the batch norms of frozen parts."""
        super().train(mode)
        for stage in self.config.freeze:
            getattr(self.backbone, stage).eval()
        if self.config.batch_norm == "frozen":
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def upsample(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] to [B, C, *size], bilinear, float32 (float64 stays)."""
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    return F.interpolate(values, size, mode="bilinear", align_corners=False)
