"""timm's networks as backbones with dense features: ViTs by their patch tokens, others by stage.

timm is imported when such a backbone is asked for, not before.
"""

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from data_pipeline.errors import InputError
from trainer.settings import TIMM
from trainer.specialise import specialise

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WORKING = (
    "what works: plain ViTs (vit_*, deit_*, deit3_*, eva02_*; DINO, DINOv2, DINOv3, MAE, CLIP, "
    "SigLIP), and what timm can dilate (convnext*, resnet*, resnext*, regnet*, efficientnet*, "
    "mobilenetv3*, nfnet*, res2net*, resnest*)"
)


def build_timm_backbone(
    name: str, output_stride: int, timm_images: bool = False, pretrained: bool = False
) -> tuple[nn.Module, int]:
    """A backbone from images [B, 3, H, W] to features [B, C, h, w], and C; timm's parameter names.

    The features cover exactly the images' extent: h = H / stride and w = W / stride, where the
    stride divides H and W. Images of other sizes are first resized to the nearest size that it
    does divide (bilinear, antialiased).

    A ViT gives its patch tokens after the last norm. A patch that is a multiple of the stride is
    moved by the stride, so that patches overlap (Amir et al., "Deep ViT Features as Dense Visual
    Descriptors", 2021). Another patch, as DINOv2's of 14 pixels, stays as it was trained: images
    are resized by patch / stride instead. Positional embeddings are resampled to the grid.

    Other networks give their last stage, with dilation instead of the strides that are too many.
    The dilated kernels of two pixels that ConvNeXts then have are padded by timm to one side: a
    feature sees half a feature too far to the right and below, which the head can make up for.

    Args:
        name: timm's, with or without the tag of its weights (after the dot).
        output_stride: pixels a feature, 8 or 16.
        timm_images: images are normalised as timm's weights of that name expect it; else the
            network sees ImageNet's normalisation, in which images come.
        pretrained: with timm's weights, which are downloaded; what is raised then is timm's.

    Raises:
        InputError: timm is missing, has no such network, or the network no such features.
    """
    known_name(name)
    network = _vision_transformer(name, output_stride, pretrained)
    if network is None:
        network = _dilated(name, output_stride, pretrained)
        channels: int = network.feature_info.channels()[-1]
    else:
        channels = network.num_features
    if timm_images:
        _normalise_again(network, *_statistics(name))
    return network, channels


def known_name(name: str) -> str:
    """`name`, if timm has it.

    Raises:
        InputError: it has not; names those that are near.
    """
    timm = import_timm()
    if name in timm.list_models() or name in timm.list_pretrained():
        return name
    architecture, _, tag = name.partition(".")
    if tag and timm.is_model(architecture):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise InputError(
            f"timm {timm.__version__} knows no weights {tag!r} of {architecture}, as "
            f"model.backbone={TIMM}{name} asks for; there are "
            f"{', '.join(tags) or 'none: leave the part after the dot away'}"
        )
    known = timm.list_models() + timm.list_pretrained()
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    raise InputError(
        f"timm {timm.__version__} has no model {name!r}, which model.backbone={TIMM}{name} "
        "asks for; " + (f"did you mean {', '.join(near)}?" if near else "see timm.list_models()")
    )


def import_timm() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise InputError(f"model.backbone={TIMM}… needs timm ({error}): pip install timm") from None
    return timm


class _DenseTokens(nn.Module):
    """Before the class of a ViT.

    Attributes:
        stride: pixels from patch to patch, of the image that the network is given.
        output_stride: pixels a feature, of the image as it came.
    """

    stride: int
    output_stride: int

    def forward(self, images: Tensor) -> Tensor:
        network: Any = self
        images = _normalised(network, images)
        rows, columns = (max(1, round(n / self.output_stride)) for n in images.shape[2:])
        images = _resized(images, (rows * self.stride, columns * self.stride))
        # networks made for the mean of all tokens have their last norm after it
        tokens: Tensor = network.fc_norm(network.forward_features(images))
        patches = tokens[:, network.num_prefix_tokens :].transpose(1, 2)
        return patches.reshape(*patches.shape[:2], rows, columns)


class _LastStage(nn.Module):
    """Before the class of a network of stages, whose forward gives a list of one."""

    output_stride: int

    def forward(self, images: Tensor) -> Tensor:
        images = _normalised(self, images)
        rows, columns = (max(1, round(n / self.output_stride)) for n in images.shape[2:])
        size = (rows * self.output_stride, columns * self.output_stride)
        stages: Any = super().forward(_resized(images, size))
        features: Tensor = stages[-1]
        return features


def _vision_transformer(name: str, output_stride: int, pretrained: bool) -> Any:
    """A ViT with dense features, or `None` if `name` is something else."""
    timm = import_timm()
    try:
        network = timm.create_model(
            name, pretrained=pretrained, num_classes=0, dynamic_img_size=True
        )
    except TypeError:  # no such arguments
        return None
    embed: Any = getattr(network, "patch_embed", None)
    if not (
        hasattr(network, "num_prefix_tokens")
        and isinstance(embed, timm.layers.PatchEmbed)  # others have a network before the patches
        and embed.proj.kernel_size == embed.proj.stride == (embed.patch_size[0],) * 2
    ):
        return None
    proj = embed.proj
    network.reset_classifier(0, "")  # pooling with parameters goes, for no gradient reaches it
    patch: int = proj.kernel_size[0]
    network.output_stride = network.stride = output_stride
    if patch % output_stride:
        network.stride = patch
    elif patch > output_stride:
        proj.stride = (output_stride, output_stride)
        proj.padding = ((patch - output_stride) // 2,) * 2
        embed.patch_size = proj.stride  # what timm wants sizes to be divisible by
    return specialise(network, _DenseTokens)


def _dilated(name: str, output_stride: int, pretrained: bool) -> Any:
    """A network of stages, whose last one has the stride."""
    timm = import_timm()
    what = f"model.backbone={TIMM}{name}"
    try:
        network = timm.create_model(
            name,
            pretrained=pretrained,
            features_only=True,
            output_stride=output_stride,
            out_indices=(-1,),
        )
    except (TypeError, AssertionError):  # timm's ways to say that it takes no output_stride
        raise InputError(
            f"{what} has no dense features at stride {output_stride}: timm cannot dilate it; "
            f"{_WORKING}"
        ) from None
    reduction = network.feature_info.reduction()[-1]
    if reduction != output_stride:
        raise InputError(
            f"{what} has its last features at stride {reduction} instead of {output_stride}; "
            f"{_WORKING}"
        )
    network.output_stride = output_stride
    specialise(network, _LastStage)
    if problem := _refusal(network, (9 * output_stride, 11 * output_stride)):
        raise InputError(f"{what} does not take images of any size ({problem}); {_WORKING}")
    return network


def _refusal(network: nn.Module, size: tuple[int, int]) -> str:
    """What `network` says to images of `size`, or ''; nothing is computed but shapes."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    training = network.training
    try:
        with torch.no_grad():
            functional_call(network.eval(), shapes, torch.empty(1, 3, *size, device="meta"))
    except Exception as error:  # whatever a network raises
        return (str(error) or type(error).__name__).splitlines()[0][:200]
    finally:
        network.train(training)
    return ""


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def _statistics(name: str) -> tuple[Iterable[float], Iterable[float]]:
    """Mean and deviation that images have for timm's weights."""
    config = import_timm().get_pretrained_cfg(name)
    return config.mean, config.std


def _normalise_again(network: nn.Module, mean: Iterable[float], std: Iterable[float]) -> None:
    """From ImageNet's mean and deviation to these."""
    here, there = (
        torch.tensor([list(m), list(s)]).view(2, 1, 3, 1, 1)
        for m, s in ((_IMAGENET_MEAN, _IMAGENET_STD), (mean, std))
    )
    if torch.equal(here, there):
        return
    scale, shift = here[1] / there[1], (here[0] - there[0]) / there[1]
    network.register_buffer("image_scale", scale, persistent=False)
    network.register_buffer("image_shift", shift, persistent=False)


def _normalised(network: Any, images: Tensor) -> Tensor:
    if not hasattr(network, "image_scale"):
        return images
    scaled: Tensor = images * network.image_scale + network.image_shift
    return scaled
