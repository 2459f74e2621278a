"""Sections of the configuration: frozen dataclasses that check themselves, and need no torch.

So a command line can be checked, or asked where its run is, without the seconds that torch takes.
"""

from dataclasses import dataclass

from data_pipeline.errors import InputError

PRECISIONS = ("float32", "bf16", "fp16")
BANK_DTYPES = ("float32", "float16", "bfloat16")
TIMM = "timm/"  # what the names of timm's networks begin with
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
BACKBONES = ("small", *RESNETS)
STAGES = {
    "small": ("stem", "layer1", "layer2", "layer3"),
    **dict.fromkeys(RESNETS, ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
}


@dataclass(frozen=True)
class EngineConfig:
    """How weights, gradients and optimizer are spread over the ranks.

    Attributes:
        name: ddp, or deepspeed.
        zero_stage: of DeepSpeed: 0 spreads nothing, 1 the optimizer, 2 gradients too, 3 weights
            too; by default the file's, or 1.
        offload_optimizer: of DeepSpeed: whether the optimizer lives in the host's memory.
        deepspeed_config: JSON file of DeepSpeed's own settings, for what has no setting here.
    """

    name: str = "ddp"
    zero_stage: int | None = None
    offload_optimizer: bool = False
    deepspeed_config: str = ""

    def __post_init__(self) -> None:
        if self.name not in ("ddp", "deepspeed"):
            raise InputError(f"engine.name is {self.name!r}; it can be ddp or deepspeed")
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise InputError(f"engine.zero_stage is {self.zero_stage}; it can be 0, 1, 2 or 3")
        of_deepspeed = {
            "zero_stage": self.zero_stage is not None,
            "offload_optimizer": self.offload_optimizer,
            "deepspeed_config": bool(self.deepspeed_config),
        }
        if self.name == "ddp" and any(of_deepspeed.values()):
            key = next(key for key, given in of_deepspeed.items() if given)
            raise InputError(f"engine.{key} is DeepSpeed's; set engine.name=deepspeed too")


@dataclass(frozen=True)
class BankConfig:
    """The memory bank.

    Attributes:
        capacity: prototypes over all ranks; 0 trains against the batch alone.
        dtype: of the keys, float32, float16, bfloat16, or auto: float16 for more than 4,096
            entries on a GPU, whose flash kernels take 16 bits only, and float32 else.
        mask_same_image: whether a pixel passes over entries of its own image.
        move: bank (entries travel to the pixels), pixels (pixels travel to the entries), or auto,
            which takes the fewer bytes.
        chunk_size: entries of all ranks that travel and are attended to at a time.
    """

    capacity: int = 128
    dtype: str = "auto"
    mask_same_image: bool = False
    move: str = "auto"
    chunk_size: int = 1 << 16

    def __post_init__(self) -> None:
        if self.capacity < 0:
            raise InputError(f"bank.capacity is {self.capacity}; it must not be negative")
        if self.chunk_size < 1:
            raise InputError(f"bank.chunk_size is {self.chunk_size}; it must be at least 1")
        if self.dtype not in ("auto", *BANK_DTYPES):
            raise InputError(
                f"bank.dtype is {self.dtype!r}; it can be auto, {', '.join(BANK_DTYPES)}"
            )
        if self.move not in ("auto", "bank", "pixels"):
            raise InputError(f"bank.move is {self.move!r}; it can be auto, bank or pixels")


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


@dataclass(frozen=True)
class LossConfig:
    """The objective.

    Attributes:
        temperature: T of the softmax over prototypes.
        balance_classes: weigh pixels by 1/ln(1.02 + share of their prototype).
        saliency_weight: of loss 2 in the sum.
        min_proposal_share: least share of a view's pixels for a proposal to count.
        pixels_per_mask: most query pixels of a proposal, evenly spread, their weights unbiased; 0
            takes all.
        pixel_stride: query pixels are one of every so many rows and columns; 1 takes all, as
            published. 8 is one for each feature at output stride 8; prototypes stay as they are.
    """

    temperature: float = 0.5
    balance_classes: bool = True
    saliency_weight: float = 1.0
    min_proposal_share: float = 0.0025
    pixels_per_mask: int = 0
    pixel_stride: int = 1

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(f"loss.temperature is {self.temperature}; it must be above 0")
        if self.saliency_weight < 0 or not 0 <= self.min_proposal_share < 1:
            raise InputError("loss.saliency_weight must be ≥ 0, loss.min_proposal_share in 0…1")
        if self.pixels_per_mask < 0:
            raise InputError(
                f"loss.pixels_per_mask is {self.pixels_per_mask}; it must not be negative"
            )
        if not 1 <= self.pixel_stride <= 64:
            raise InputError(f"loss.pixel_stride is {self.pixel_stride}; it can be 1 to 64")


@dataclass(frozen=True)
class OnlineConfig:
    """Evaluation while training: K-means on labelled shards, as `maskbank evaluate kmeans`.

    Attributes:
        shards: folder or address of labelled shards; empty evaluates nothing.
        every: steps; and before the first.
        images: so many of the shards, evenly spread; 0 takes all.
        size: side that images are resized to, pixels; 0 takes views.image_size.
        batch_size: images a forward pass and rank.
        clusters: K; 0 takes the number of classes without background. Where there are more than
            classes each takes its best class.
        seeds: clusterings, of which mean and deviation are logged.
        pca: dimensions after whitened PCA; 0 does none.
        foreground: pixels whose saliency logit (as published) or probability is above 0.5, or those
            of the shards' own masks: logit, probability or mask.
        pooling: of a foreground's embeddings: weighted by the logit (as published), or normalized.
    """

    shards: str = ""
    every: int = 500
    images: int = 0
    size: int = 0
    batch_size: int = 16
    clusters: int = 0
    seeds: int = 5
    pca: int = 32
    foreground: str = "logit"
    pooling: str = "weighted"

    def __post_init__(self) -> None:
        if min(self.every, self.batch_size, self.seeds) < 1:
            raise InputError("online.every, online.batch_size and online.seeds must be at least 1")
        if min(self.images, self.size, self.clusters, self.pca) < 0:
            raise InputError(
                "online.images, online.size, online.clusters and online.pca must not be negative"
            )
        if self.foreground not in ("logit", "probability", "mask"):
            raise InputError(
                f"online.foreground is {self.foreground!r}; it can be logit, probability or mask"
            )
        if self.pooling not in ("weighted", "normalized"):
            raise InputError(
                f"online.pooling is {self.pooling!r}; it can be weighted or normalized"
            )
