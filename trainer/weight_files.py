"""Files of named tensors, ours and those of others: read without unpickling, named as here."""

import argparse
import logging
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import InputError

log = logging.getLogger(__name__)

# What checkpoints of others put before their names, and what that part is called here.
_PREFIXES = (
    ("module.encoder_q.", "backbone."),  # MoCo v1 and v2
    ("encoder_q.", "backbone."),
    ("module.base_encoder.", "backbone."),  # MoCo v3
    ("module.model_q.", ""),  # released MaskContrast
    ("model_q.", ""),
    ("teacher.", ""),  # DINOv2
    ("module.", ""),
)
_RENAMED = {
    "head.weight": "embedding_head.weight",
    "head.bias": "embedding_head.bias",
    "classification_head.weight": "saliency_head.weight",
    "decoder.4.weight": "classifier.weight",  # of the released linear probes, and torchvision
    "decoder.4.bias": "classifier.bias",
}
_WRAPPERS = ("teacher", "state_dict", "model", "student")  # around the network's tensors
# heads of classifiers, MoCo, DINO, SwAV and timm's networks, and of torchvision's training
_HEADS = (
    *("fc.", "backbone.fc.", "backbone.head.", "backbone.head_dist.", "backbone.head_drop."),
    *("backbone.classifier.", "backbone.attn_pool.", "backbone.pre_logits."),
    *("head.mlp.", "head.last_layer.", "backbone.projection_head.", "backbone.prototypes."),
    "aux_classifier.",
)
# the second network of contrastive methods, and what else they learn with
_BESIDE = re.compile(
    r"(module\.)?((model_k|encoder_k|momentum_encoder|predictor|student)\.|queue(_ptr)?$)"
)


def read_tensors(path: Path, what: str = "model.start") -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` or torch file; never unpickles objects.

    Args:
        path: of the file.
        what: the user gave it as; begins the messages.

    Raises:
        InputError: it cannot be read, holds no named tensors, or one is larger than its bytes.
    """
    try:
        if path.suffix == ".safetensors":
            raw: Any = load_file(path)
        else:
            _refuse_compressed(path)
            # DINO's full checkpoints hold their arguments, which are a plain record
            with torch.serialization.safe_globals([argparse.Namespace]):
                raw = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{what}: there is no file {path}") from None
    except IsADirectoryError:
        raise InputError(f"{what}: {path} is a folder; name a file in it") from None
    except Exception as error:  # the safe unpickler raises anything on a stranger's bytes
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"{what}: {path} cannot be read as tensors ({reason}); "
            "expected safetensors or a state dict"
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(raw, dict) and isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    items = raw.items() if isinstance(raw, dict) else ()
    state = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"{what}: {path} holds no named tensors")
    for name, value in state.items():
        # shapes may be made up by strides of 0, and are what memory is taken for
        if value.layout != torch.strided or value.untyped_storage().nbytes() < value.nbytes:
            raise InputError(f"{what}: {path}: {name[:200]} is no dense tensor of its own")
    if len(state) < len(raw):
        log.info("%s: %d entries beside the tensors are not used", path, len(raw) - len(state))
    return state


def _refuse_compressed(path: Path) -> None:
    """torch never compresses; another's file could unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its parts are compressed, which torch.save never does")


def our_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors by the names of a pixel encoder, and the names of those left out.

    Knows MoCo, DINO, torchvision's ResNets and DeepLabV3, and released MaskContrast with its linear
    probes, whose classifier is `classifier.weight` [C, K, 1, 1] and `classifier.bias` here. Of two
    networks the one that is trained by gradients is taken, of DINO's the teacher.
    """
    left: list[str] = []
    for prefix, ours in _PREFIXES:
        chosen = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        if chosen:
            left += [name for name in state if not name.startswith(prefix)]
            state = {ours + name: value for name, value in chosen.items()}
    if "conv1.weight" in state:  # a plain torchvision ResNet
        state = {f"backbone.{name}": value for name, value in state.items()}
    if "classifier.0.convs.0.0.weight" in state:  # torchvision's DeepLabV3
        state = {re.sub(r"^classifier\.", "decoder.", n): value for n, value in state.items()}
    return {_RENAMED.get(name, name): value for name, value in state.items()}, left


def known_unused(name: str) -> bool:
    """Whether a tensor is known to do nothing for dense features."""
    return bool(name.startswith(_HEADS) or _BESIDE.match(name))


def count_parts(names: Iterable[str]) -> str:
    """`names` by what they begin with, as `fc 2, module.encoder_k 161`, or none."""
    parts = Counter(re.match(r"(module\.|backbone\.)?[^.]*", name)[0] for name in names)  # type: ignore[index]
    shown = ", ".join(f"{part[:80]} {count}" for part, count in sorted(parts.items())[:8])
    return (shown or "none") + (f" and {len(parts) - 8} more parts" if len(parts) > 8 else "")
