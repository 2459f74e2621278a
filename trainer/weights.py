"""Where a network starts: ImageNet, MoCo v2, DINO, or any safetensors file or state dict."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torchvision
from torch import Tensor, nn

from data_pipeline.errors import InputError
from trainer.model import PixelEncoder
from trainer.settings import RESNETS, TIMM
from trainer.timm_weights import pretrained_state, timm_state
from trainer.weight_files import known_unused, our_names, read_tensors

log = logging.getLogger(__name__)


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
        state, _ = our_names(read_tensors(Path(start)))
    report = load_matching(encoder, state, start)
    log.info("start %s: %s", start, report)
    return report


def load_matching(module: nn.Module, state: dict[str, Tensor], origin: str) -> LoadReport:
    """Copies every tensor of `state` that `module` has, after checking all of their shapes."""
    own = module.state_dict()
    unexpected = [n for n in state if n not in own and not known_unused(n)]
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


def load_exactly(module: nn.Module, state: dict[str, Tensor], origin: str, other: str) -> None:
    """Copies `state` to `module`, which has the same tensors; counters of batch norms may miss.

    Args:
        module: takes them.
        state: its tensors by name.
        origin: how to call where `state` is from.
        other: how to call what says how `module` is built.

    Raises:
        InputError: a tensor is missing, too many, or of another shape.
    """
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name.endswith("num_batches_tracked") and name not in state:
            continue
        if _shape(state, name) != _shape(own, name):
            raise InputError(
                f"{origin} is of another architecture than {other}: {name} is "
                f"{_shape(state, name)} there, and {_shape(own, name)} by the latter"
            )
    module.load_state_dict(state, strict=False)


def _shape(state: dict[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "missing"


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


def _short(names: list[str] | tuple[str, ...]) -> str:
    if not names:
        return "none"
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
