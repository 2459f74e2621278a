"""The pixel encoder: backbone, DeepLabV3 head, and 1×1 heads for embedding and saliency."""

import difflib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP

from data_pipeline.errors import InputError
from trainer.activation_checkpointing import checkpoint_blocks, find_blocks
from trainer.backbones import BACKBONES, STAGES, build_backbone
from trainer.timm_backbones import PREFIX as TIMM


@dataclass(frozen=True)
class ModelConfig:
    """The network and where it starts.

    Attributes:
        backbone: small, resnet18, resnet34, resnet50, resnet101, or timm/NAME for a network of
            timm, as timm/vit_small_patch16_224 or timm/convnext_tiny (`timm_backbones.py`).
        output_stride: pixels a feature, 8 or 16; `small` always has 4.
        embedding_dim: D of the pixel embeddings.
        decoder_channels: width of the DeepLabV3 head.
        atrous_rates: of the head's pyramid, in features; DeepLabV3 has half of these at stride 16.
        dropout: of the head's pyramid.
        start: random, imagenet (torchvision's or timm's weights), or a file: MoCo v2,
            safetensors or a state dict. Images reach timm's networks normalised as timm says for
            its weights, where these are named: start=imagenet, or a name with a tag (after the
            dot); else with ImageNet's mean and deviation, as of DINO, DINOv2, MAE and MoCo v3.
        freeze: stages of the backbone without gradient, their batch norms in eval mode. Of timm's
            networks any part, as patch_embed, pos_embed, blocks.0, stem_0 or stages_0.
        batch_norm: plain (each rank its own statistics), sync (over all ranks), shuffle (plain,
            with the key images shuffled over the ranks: MoCo), frozen (running statistics).
        momentum: m of the momentum encoder.
        checkpoint_activations: compute the activations of the backbone's blocks again in the
            backward pass instead of keeping them; the same result in less memory.
        compile: run the blocks through torch.compile; rounding may differ.
    """

    backbone: str = "resnet50"
    output_stride: int = 8
    embedding_dim: int = 32
    decoder_channels: int = 256
    atrous_rates: tuple[int, int, int] = (12, 24, 36)
    dropout: float = 0.5
    start: str = "random"
    freeze: tuple[str, ...] = ()
    batch_norm: str = "plain"
    momentum: float = 0.999
    checkpoint_activations: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES and not self.backbone.startswith(TIMM):
            raise InputError(
                f"model.backbone is {self.backbone!r}; it can be {', '.join(BACKBONES)}, or "
                f"{TIMM}NAME for a network of timm, as {TIMM}vit_small_patch16_224"
            )
        self._check_stride()
        # what a network of timm has is known when it is built
        stages = STAGES.get(self.backbone, self.freeze)
        unknown = [stage for stage in self.freeze if stage not in stages]
        if unknown:
            raise InputError(
                f"model.freeze names {unknown[0]!r}; {self.backbone} has the stages "
                f"{', '.join(stages)}"
            )
        if self.batch_norm not in ("plain", "sync", "shuffle", "frozen"):
            raise InputError(
                f"model.batch_norm is {self.batch_norm!r}; it can be plain, sync, shuffle or frozen"
            )
        if self.embedding_dim < 1 or self.decoder_channels < 1:
            raise InputError("model.embedding_dim and model.decoder_channels must be at least 1")
        if not 0 <= self.dropout < 1 or not 0 <= self.momentum <= 1:
            raise InputError("model.dropout must be in 0…1 (1 excluded), model.momentum in 0…1")

    def _check_stride(self) -> None:
        if self.backbone == "small":
            if self.output_stride not in (4, 8):  # 8 is what nobody has set
                raise InputError(
                    f"model.output_stride is {self.output_stride}, but small always has 4; leave "
                    "it away, or take another model.backbone"
                )
        elif self.output_stride not in (8, 16):
            raise InputError(f"model.output_stride is {self.output_stride}; it can be 8 or 16")

    @property
    def timm_images(self) -> bool:
        """Whether images are normalised as timm says for the weights that are named."""
        tagged = self.backbone.startswith(TIMM) and "." in self.backbone
        return tagged or self.start == "imagenet"


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
