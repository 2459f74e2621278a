"""Networks from files: released checkpoints of others, and our own exported ones.

The architecture is read from names and shapes. What they do not tell, the stride and the atrous
rates, is that of the published networks (8; 12, 24, 36) unless the file describes itself, lies in a
run directory, or the caller says it.
"""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_pipeline.errors import InputError
from trainer.model import PixelEncoder
from trainer.network_description import parse_description
from trainer.partial import PARTS, Part, PartialEncoder
from trainer.settings import TIMM, ModelConfig
from trainer.timm_weights import timm_state
from trainer.weight_files import count_parts, known_unused, our_names, read_tensors
from trainer.weights import load_exactly

log = logging.getLogger(__name__)

Classifier = tuple[Tensor, Tensor]
_BLOCKS: dict[
    tuple[tuple[int, ...], bool], str
] = {  # of layer1 to layer4, and whether they are bottlenecks
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
}
_FIRST_NAMES: tuple[tuple[Part, str], ...] = (
    ("decoder", "decoder."),
    ("embedding", "embedding_head."),
    ("saliency", "saliency_head."),
)
# where a tensor that this network has not would change what the others do
_WITHIN = re.compile(
    r"backbone\.(conv|bn|layer|stem|downsample)|decoder\.|(embedding|saliency)_head\."
)


@dataclass(frozen=True)
class FileNetwork:
    """What a file holds.

    Attributes:
        network: with the file's tensors.
        parts: that it has.
        classifier: weight [C, K, 1, 1] and bias [C] on its K features, of a linear probe.
        step: optimizer steps that it was trained for, where the file says it, or 0.
    """

    network: PixelEncoder | PartialEncoder
    parts: frozenset[Part]
    classifier: Classifier | None
    step: int


def read_network(path: Path, model: ModelConfig | None = None) -> FileNetwork:
    """The network of a file, every tensor of which is used, or known to be of no use, or named.

    Args:
        path: safetensors, or a torch file without objects: released MaskContrast and its linear
            probes, MoCo, DINO, torchvision's ResNets and DeepLabV3, or our own names.
        model: its architecture, if it is not what the file says.

    Raises:
        InputError: it cannot be read, is of no known architecture, or lacks a tensor.
    """
    raw = read_tensors(path, "network")
    described = parse_description(_metadata(path), str(path))
    if model is None and described is not None:
        model = described[0]
    if model is not None and model.backbone.startswith(TIMM):
        state, left = _timm_names(raw, model, path)
    else:
        state, left = our_names(raw)
    _check_numbers(state, path)
    parts = _parts(state, path)
    config = _config(state, parts, model, path)
    classifier = _take_classifier(state, path)
    network = _build(config, parts)
    own = network.state_dict()
    unused = [name for name in state if name not in own and not _WITHIN.match(name)]
    state = {name: value for name, value in state.items() if name not in unused}
    load_exactly(network, state, str(path), f"{config.backbone} with the heads that it has")
    if classifier is not None:
        _check_classifier(classifier, network.config.decoder_channels, path)
    _report(path, config, len(state), left, unused)
    return FileNetwork(network, parts, classifier, 0 if described is None else described[1])


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:  # it has been read once: it is sound
        return dict(file.metadata() or {})


def _timm_names(
    raw: dict[str, Tensor], model: ModelConfig, path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by the names of an encoder with a backbone of timm."""
    own = _build(model, frozenset(("backbone",))).state_dict()
    if own.keys() <= raw.keys():  # as exported here
        return dict(raw), []
    state = timm_state(model.backbone.removeprefix(TIMM), own, raw, str(path))
    return dict(state), []


def _check_numbers(state: dict[str, Tensor], path: Path) -> None:
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        if not value.is_floating_point():
            raise InputError(f"{path}: {name} holds {value.dtype} instead of floating point")
        if not value.isfinite().all():
            raise InputError(f"{path}: {name} has NaN or infinite values; copy the file here anew")


def _parts(state: dict[str, Tensor], path: Path) -> frozenset[Part]:
    if not any(name.startswith("backbone.") for name in state):
        raise InputError(
            f"{path} holds no network that is known here: its tensors are "
            f"{count_parts(state)}; known are MaskContrast, MoCo, DINO and torchvision's ResNets "
            "and DeepLabV3, and exported networks of maskbank"
        )
    found = {part for part, first in _FIRST_NAMES if any(n.startswith(first) for n in state)}
    if found and "decoder" not in found:
        raise InputError(f"{path} has heads, but no decoder that they belong to")
    return frozenset(found | {"backbone"})


def _config(
    state: dict[str, Tensor], parts: frozenset[Part], model: ModelConfig | None, path: Path
) -> ModelConfig:
    """The architecture; widths are always those of the tensors, so that they are bounded."""
    config = model or ModelConfig(backbone=_backbone(state, path))
    sizes: dict[str, Any] = {}
    if "decoder" in parts:
        sizes["decoder_channels"] = _side(state, "decoder.1.weight", path)
    if "embedding" in parts:
        weight = "embedding_head.weight"
        sizes["embedding_dim"] = _side(state, weight, path)
        if state[weight].shape[1] != sizes["decoder_channels"]:
            raise InputError(
                f"{path}: {weight} takes {state[weight].shape[1]} channels, but the decoder gives "
                f"{sizes['decoder_channels']}"
            )
    for name, size in sizes.items():
        if model is not None and getattr(model, name) != size:
            raise InputError(
                f"{path} is of another architecture than it should be: {name} is {size} by its "
                f"tensors, and {getattr(model, name)} by its description"
            )
    return replace(config, **sizes)


def _side(state: dict[str, Tensor], name: str, path: Path) -> int:
    """Channels that a convolution [out, in, h, w] gives."""
    if name not in state or state[name].ndim != 4 or state[name].shape[0] < 1:
        there = list(state[name].shape) if name in state else "missing"
        raise InputError(f"{path}: {name} is {there}, and should be a convolution's weight")
    return state[name].shape[0]


def _backbone(state: dict[str, Tensor], path: Path) -> str:
    if "backbone.stem.0.weight" in state and "backbone.layer4.0.conv1.weight" not in state:
        return "small"
    counts = tuple(
        len({n.split(".")[2] for n in state if n.startswith(f"backbone.layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    name = _BLOCKS.get((counts, bottleneck))
    if name is None:
        raise InputError(
            f"{path}: its backbone is none of {', '.join(_BLOCKS.values())} or small: it has "
            f"{count_parts(n for n in state if n.startswith('backbone.'))}; say what it is with "
            "load_encoder(…, model=ModelConfig(…))"
        )
    return name


def _take_classifier(state: dict[str, Tensor], path: Path) -> Classifier | None:
    weight, bias = state.pop("classifier.weight", None), state.pop("classifier.bias", None)
    if weight is None:
        if bias is not None:
            raise InputError(f"{path}: the classifier has a bias, but no weight")
        return None
    return weight.float(), torch.zeros(weight.shape[:1]) if bias is None else bias.float()


def _check_classifier(classifier: Classifier, width: int, path: Path) -> None:
    weight, bias = (list(value.shape) for value in classifier)
    if weight[1:] != [width, 1, 1] or bias != weight[:1]:
        raise InputError(
            f"{path}: classifier.weight is {weight} and its bias {bias}; on {width} features they "
            f"should be [classes, {width}, 1, 1] and [classes]"
        )


def _build(config: ModelConfig, parts: frozenset[Part]) -> PixelEncoder | PartialEncoder:
    """The network, all of whose tensors are to be loaded; changes nobody's random numbers."""

    def make() -> PixelEncoder | PartialEncoder:
        return PixelEncoder(config) if parts == PARTS else PartialEncoder(config, parts)

    if config.backbone.startswith(TIMM):  # has tensors beside those that files hold
        with torch.random.fork_rng(devices=[]):
            return make()
    with torch.device("meta"):
        network = make()
    network.to_empty(device="cpu")
    for buffer in network.buffers():  # counters may be missing in files
        buffer.zero_()
    return network


def _report(
    path: Path, config: ModelConfig, loaded: int, left: list[str], unused: list[str]
) -> None:
    names = [*left, *unused]
    known = [name for name in names if known_unused(name)]
    unknown = [name for name in names if not known_unused(name)]
    log.info(
        "%s: %s, %d tensors loaded; without use here: %s",
        *(path, config.backbone, loaded, count_parts(known)),
    )
    if unknown:
        log.warning("%s: %d tensors are not used: %s", path, len(unknown), count_parts(unknown))
