"""Weights for timm's networks: names brought to timm's, positions to the network's grid."""

import inspect
import logging
import sys
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import InputError
from trainer.settings import TIMM
from trainer.timm_backbones import build_timm_backbone, import_timm

log = logging.getLogger(__name__)

_OURS = ("decoder.", "embedding_head.", "saliency_head.")
_UNWANTED = ("student", "encoder_k", "momentum")  # networks beside the one that is wanted


def pretrained_state(name: str, output_stride: int) -> dict[str, Tensor]:
    """timm's own weights of its network `name`, named as in a pixel encoder; downloads them.

    Raises:
        InputError: there are none, or they cannot be downloaded.
    """
    timm = import_timm()
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        known = timm.list_pretrained(f"{name.partition('.')[0]}*")
        raise InputError(
            f"model.start is imagenet, but timm has no weights of {name}; it has them of "
            f"{', '.join(known[:5]) or 'no network of that name'}; or give model.start=FILE"
        )
    try:
        network, _ = build_timm_backbone(name, output_stride, pretrained=True)
    except InputError:
        raise
    except Exception as error:  # the hub's client raises errors of several libraries
        raise InputError(
            f"timm's weights of {name} cannot be downloaded ({_first_line(error)}); fetch the file "
            "on a machine with a network and give it as model.start=FILE"
        ) from None
    return {f"backbone.{key}": value for key, value in network.state_dict().items()}


def timm_state(
    name: str, own: dict[str, Tensor], state: dict[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """`state` with the names of a pixel encoder whose backbone is timm's `name`.

    Takes names of timm under any prefix, as DINO's and MoCo's files have them, and those that timm
    converts itself, as of DINOv2 and of the released ConvNeXts. Of DINO's two networks in a file
    the teacher is taken, of MoCo's the one that is trained. Positional embeddings are resampled to
    the grid of the network.

    Args:
        own: the encoder's tensors.
        state: of the file.
        origin: how to call the file.

    Raises:
        InputError: patches are of another size, or the file is of another kind of network.
    """
    if any(key in own for key in state if key.startswith(_OURS)):
        return state
    config = import_timm().get_pretrained_cfg(name)
    firsts = (config.first_conv,) if isinstance(config.first_conv, str) else config.first_conv or ()
    # the released ConvNeXts call timm's stem.0 so
    state = _without_prefix(state, (*firsts, "downsample_layers.0.0"))
    _check_patches(name, own, state, origin)
    try:
        converted = _as_timm(name, state)
    except Exception as error:  # made for timm's own files: raises anything on others
        raise InputError(
            f"{origin} does not fit {TIMM}{name} ({_first_line(error)}); set model.backbone to "
            "the network whose weights it has"
        ) from None
    before, after = state.get("pos_embed"), converted.get("pos_embed")
    if before is not None and after is not None and before.shape != after.shape:
        log.info(
            "start %s: positional embeddings resampled from %d to %d tokens",
            origin,
            before.shape[1],
            after.shape[1],
        )
    return {f"backbone.{_flat(key, own)}": value for key, value in converted.items()}


def _without_prefix(state: dict[str, Tensor], firsts: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of one network, found by its first convolution."""
    prefixes = {
        key.removesuffix(f"{first}.weight")
        for first in firsts
        for key in state
        if key == f"{first}.weight" or key.endswith(f".{first}.weight")
    }
    if not prefixes:
        return state

    def rank(prefix: str) -> tuple[bool, int, str]:
        # convolutions further inside may have the first one's name, and longer prefixes
        return any(word in prefix for word in _UNWANTED), len(prefix), prefix

    prefix = min(prefixes, key=rank)
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def _check_patches(
    name: str, own: dict[str, Tensor], state: dict[str, Tensor], origin: str
) -> None:
    """timm would resample the kernels silently."""
    here = own.get("backbone.patch_embed.proj.weight")
    there = state.get("patch_embed.proj.weight", state.get("visual.conv1.weight"))  # or CLIP's
    if here is None or there is None or there.ndim != 4 or here.shape[2:] == there.shape[2:]:
        return
    raise InputError(
        f"{origin} has patches of {there.shape[2]}×{there.shape[3]} pixels, {TIMM}{name} of "
        f"{here.shape[2]}×{here.shape[3]}; set model.backbone to the network whose weights it has"
    )


def _as_timm(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As timm would load it, by the function that it has for networks of this kind."""
    timm = import_timm()
    entry = timm.model_entrypoint(name.partition(".")[0])
    convert: Any = getattr(sys.modules[entry.__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        with torch.device("meta"):  # only its shapes are asked for
            network = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, NotImplementedError):  # older timm computes with them
        with torch.random.fork_rng(devices=[]):
            network = timm.create_model(name, pretrained=False, num_classes=0)
    options = {}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:
        options["adapt_layer_scale"] = True  # as DeiT III's are named
    converted: dict[str, Tensor] = convert(dict(state), network, **options)
    return converted


def _flat(key: str, own: dict[str, Tensor]) -> str:
    """timm's name of a tensor in the network that gives features, which joins the first two."""
    joined = key.replace(".", "_", 1)
    return joined if f"backbone.{joined}" in own else key


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
