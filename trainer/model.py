"""The pixel encoder: backbone, DeepLabV3 head, and 1×1 heads for embedding and saliency."""

import difflib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP

from data_pipeline.errors import InputError
from trainer.activation_checkpointing import checkpoint_blocks, find_blocks
from trainer.atrous import trim_dilated
from trainer.backbones import build_backbone
from trainer.dropout import Dropout
from trainer.settings import ModelConfig


class PixelOutput(NamedTuple):
    """Embeddings [B, D, h, w] (not normalised) and saliency logits [B, 1, h, w], at the stride."""

    embedding: Tensor
    saliency: Tensor


class PixelEncoder(nn.Module):
    """Images [B, 3, H, W] to `PixelOutput` (MaskContrast, section 3.2 and supplementary).

    Args:
        config: of the network; its start is loaded by `weights.py`, and training compiles it
            (`compilation.py`).

    Raises:
        InputError: a network that timm has not, or a part to freeze that it has not.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, channels = build_backbone(
            config.backbone, config.output_stride, config.timm_images
        )
        width = config.decoder_channels
        self.decoder = deeplab_decoder(channels, config)
        self.embedding_head = nn.Conv2d(width, config.embedding_dim, 1)
        self.saliency_head = nn.Conv2d(width, 1, 1, bias=False)
        for part in self._frozen():
            part.requires_grad_(False)
        if config.checkpoint_activations:
            checkpoint_blocks(self.backbone)

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
        for part in self._frozen():
            if isinstance(part, nn.Module):
                part.eval()
        if self.config.batch_norm == "frozen":
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def _frozen(self) -> list[nn.Module | nn.Parameter]:
        """The backbone's modules and parameters that `model.freeze` names."""
        parts = [_part(self.backbone, name) for name in self.config.freeze]
        for name, part in zip(self.config.freeze, parts, strict=True):
            if part is None:
                raise InputError(
                    f"model.freeze names {name!r}, which {self.config.backbone} has not; "
                    f"{_parts_near(self.backbone, name)}"
                )
        return [part for part in parts if part is not None]


def deeplab_decoder(channels: int, config: ModelConfig) -> nn.Sequential:
    """torchvision's DeepLabHead without its last layer, with its names.

    From features [B, channels, h, w] to [B, decoder_channels, h, w].
    """
    width = config.decoder_channels
    pyramid = ASPP(channels, list(config.atrous_rates), width)
    trim_dilated(pyramid)
    pyramid.project[3] = Dropout(config.dropout)
    return nn.Sequential(
        pyramid,
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


def _part(module: nn.Module, name: str) -> nn.Module | nn.Parameter | None:
    """The module or parameter `name`, dots between the levels."""
    owner, _, last = name.rpartition(".")
    try:
        part = getattr(module.get_submodule(owner), last, None)
    except AttributeError:
        return None
    return part if isinstance(part, nn.Module | nn.Parameter) else None


def _parts_near(network: nn.Module, name: str) -> str:
    """What could have been meant, and what there is."""
    names = [inner for inner, _ in (*network.named_modules(), *network.named_parameters())]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    top = dict.fromkeys(inner.partition(".")[0] for inner, _ in network.named_parameters())
    block = next(inner for inner, part in network.named_modules() if part in find_blocks(network))
    meant = f"did you mean {', '.join(close)}? " if close else ""
    return f"{meant}it has {', '.join(top)} and their parts, as {block}"


def upsample(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] to [B, C, *size], bilinear, float32 (float64 stays)."""
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    return F.interpolate(values, size, mode="bilinear", align_corners=False)
