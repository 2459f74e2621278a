"""Where a network starts: ImageNet, MoCo v2, DINO, or any safetensors file or state dict."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.errors import InputError
from trainer.model import PixelEncoder
from trainer.settings import RESNETS, TIMM
from trainer.timm_weights import pretrained_state, timm_state

log = logging.getLogger(__name__)

# What checkpoints of others put before their names, and what that part is called here.
_PREFIXES = (
    ("module.encoder_q.", "backbone."),  # MoCo v1 and v2
    ("module.model_q.", ""),  # released MaskContrast
    ("model_q.", ""),
    ("module.", ""),
)
_RENAMED = (("head.", "embedding_head."), ("classification_head.", "saliency_head."))
# image-level heads: of classifiers, of MoCo, and of timm's networks
_WITHOUT_USE = (
    *("fc.", "backbone.fc.", "backbone.head.", "backbone.head_dist.", "backbone.head_drop."),
    *("backbone.classifier.", "backbone.attn_pool.", "backbone.pre_logits."),
)
_WRAPPERS = ("teacher", "state_dict", "model")  # of checkpoints, around the network's tensors


@dataclass(frozen=True)
class LoadReport:
    """What a file gave to a network: names of parameters and buffers."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.loaded)} tensors loaded; missing (left at random): {_short(self.missing)}; "
            f"unexpected (not used): {_short(self.unexpected)}"
        )


def load_start(encoder: PixelEncoder, start: str) -> LoadReport | None:
    """Loads what `model.start` names into `encoder`; `None` for a random start.

    Raises:
        InputError: the file cannot be read, holds no tensors, or is of another architecture.
    """
    if start == "random":
        return None
    config = encoder.config
    if config.backbone.startswith(TIMM):
        name = config.backbone.removeprefix(TIMM)
        if start == "imagenet":
            state = pretrained_state(name, config.output_stride)
        else:
            state = timm_state(name, encoder.state_dict(), read_tensors(Path(start)), start)
    elif start == "imagenet":
        state = _imagenet(config.backbone)
    else:
        state = _our_names(read_tensors(Path(start)))
    report = load_matching(encoder, state, start)
    log.info("start %s: %s", start, report)
    return report


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` or torch file; never unpickles objects."""
    try:
        if path.suffix == ".safetensors":
            raw: Any = load_file(path)
        else:
            # DINO's full checkpoints hold their arguments, which are a plain record
            with torch.serialization.safe_globals([argparse.Namespace]):
                raw = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"model.start: there is no file {path}") from None
    except IsADirectoryError:
        raise InputError(f"model.start: {path} is a folder; name a file in it") from None
    except Exception as error:  # the safe unpickler raises anything on a stranger's bytes
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"model.start: {path} cannot be read as tensors ({reason}); "
            "expected safetensors or a state dict"
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(raw, dict) and isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    state = {k: v for k, v in raw.items() if isinstance(v, Tensor)} if isinstance(raw, dict) else {}
    if not state:
        raise InputError(f"model.start: {path} holds no named tensors")
    return state


def load_matching(module: nn.Module, state: dict[str, Tensor], origin: str) -> LoadReport:
    """Copies every tensor of `state` that `module` has, after checking all of their shapes."""
    own = module.state_dict()
    unexpected = [n for n in state if n not in own and not n.startswith(_WITHOUT_USE)]
    loaded = [name for name in own if name in state]
    for name in loaded:
        if own[name].shape != state[name].shape:
            raise InputError(
                f"{origin} is of another architecture: {name} is {list(state[name].shape)} there "
                f"and {list(own[name].shape)} here; set model.backbone and head sizes to match"
            )
    if not loaded:
        raise InputError(
            f"{origin} has none of this network's tensors: it has {_short(list(state))}, "
            f"the network {_short(list(own))}"
        )
    module.load_state_dict({name: state[name] for name in loaded}, strict=False)
    counters = ("num_batches_tracked",)
    missing = [n for n in own if n not in state and not n.endswith(counters)]
    return LoadReport(tuple(loaded), tuple(missing), tuple(unexpected))


def _imagenet(backbone: str) -> dict[str, Tensor]:
    if backbone not in RESNETS:
        raise InputError(f"model.start is imagenet, but there are no such weights for {backbone}")
    try:
        # V1 as in the paper, whose networks are older than V2
        network = getattr(torchvision.models, backbone)(weights="IMAGENET1K_V1")
    except OSError as error:
        raise InputError(
            f"torchvision's weights of {backbone} cannot be downloaded ({error}); fetch the file "
            "on a machine with a network and give it as model.start=FILE"
        ) from None
    return {f"backbone.{name}": value for name, value in network.state_dict().items()}


def _our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix, ours in _PREFIXES:
        chosen = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        if chosen:
            state = {ours + name: value for name, value in chosen.items()}
            break
    if "conv1.weight" in state:  # a plain torchvision ResNet
        state = {f"backbone.{name}": value for name, value in state.items()}
    return {_rename(name): value for name, value in state.items()}


def _rename(name: str) -> str:
    for theirs, ours in _RENAMED:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _short(names: list[str] | tuple[str, ...]) -> str:
    if not names:
        return "none"
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
