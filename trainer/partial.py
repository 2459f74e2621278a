"""Networks that lack a part of ours: a backbone alone, or one with a decoder."""

from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor, nn

from data_pipeline.errors import InputError
from trainer.backbones import build_backbone
from trainer.model import PixelOutput, deeplab_decoder
from trainer.settings import ModelConfig

Part = Literal["backbone", "decoder", "embedding", "saliency"]
PARTS: frozenset[Part] = frozenset(("backbone", "decoder", "embedding", "saliency"))


class PartialOutput(NamedTuple):
    """Embeddings [B, D, h, w] (not normalised) at the stride; of a network without saliency."""

    embedding: Tensor

    @property
    def saliency(self) -> Tensor:
        """Raises InputError."""
        raise InputError("this network has no saliency head")


class PartialEncoder(nn.Module):
    """Images [B, 3, H, W] to what the network has of `PixelOutput`.

    Features are those of the last part before the heads, and without an embedding head they are
    the embeddings too: of a ResNet-50 alone both are layer4's [B, 2048, h, w].

    Args:
        config: of the network; widths of what it has not are replaced by those of its features.
        parts: what it has; a head needs a decoder.
    """

    def __init__(self, config: ModelConfig, parts: frozenset[Part]) -> None:
        super().__init__()
        assert "decoder" in parts or not parts & {"embedding", "saliency"}
        self.backbone, width = build_backbone(
            config.backbone, config.output_stride, config.timm_images
        )
        self.decoder: nn.Module = nn.Identity()
        if "decoder" in parts:
            self.decoder = deeplab_decoder(width, config)
            width = config.decoder_channels
        self.embedding_head: nn.Module = nn.Identity()
        dim = width
        if "embedding" in parts:
            dim = config.embedding_dim
            self.embedding_head = nn.Conv2d(width, dim, 1)
        self.saliency_head = nn.Conv2d(width, 1, 1, bias=False) if "saliency" in parts else None
        self.config = replace(config, decoder_channels=width, embedding_dim=dim)

    def features(self, images: Tensor) -> Tensor:
        """Features [B, C, h, w] at the stride, of the decoder where there is one."""
        features: Tensor = self.decoder(self.backbone(images))
        return features

    def forward(self, images: Tensor) -> PixelOutput | PartialOutput:
        return self.heads(self.features(images))

    def heads(self, features: Tensor) -> PixelOutput | PartialOutput:
        """What the heads make of features [B, C, h, w]."""
        embedding: Tensor = self.embedding_head(features)
        if self.saliency_head is None:
            return PartialOutput(embedding)
        return PixelOutput(embedding, self.saliency_head(features))
