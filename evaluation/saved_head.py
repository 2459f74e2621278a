"""What an evaluation learned on top of a network, as one file: cluster centres or a classifier.

`maskbank predict` and `maskbank evaluate transfer` take it. Safetensors: numbers by name, and their
meaning as JSON in the file's own header; nothing is unpickled.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write
from data_pipeline.resize import RESIZES, Resize
from evaluation.cluster import Clusters
from evaluation.prototypes import PrototypeConfig

_FORMAT = "maskbank-head-1"
_TENSORS = {
    "kmeans": ("mean", "directions", "centres", "class_of_cluster"),
    "pixel-kmeans": ("mean", "directions", "centres", "class_of_cluster"),
    "linear": ("weight", "bias"),
}
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class SavedHead:
    """A head.

    Attributes:
        kind: kmeans (of images' foregrounds), pixel-kmeans (of all pixels), or linear.
        tensors: kmeans: mean [D], directions [D, d], centres [K, d] (float64) and class_of_cluster
            int64 (see `kmeans.Clustering`); linear: weight [C, F], bias [C].
        classes: names, background first.
        data_set: that it was made on; decides the palette.
        size: side that images had, pixels.
        prototype: of kmeans, how an image's vector is taken.
        step: of the network that it belongs to.
        resize: how images became squares (`resize_image`).
    """

    kind: Literal["kmeans", "pixel-kmeans", "linear"]
    tensors: dict[str, Tensor]
    classes: tuple[str, ...]
    data_set: str
    size: int
    prototype: PrototypeConfig
    step: int
    resize: Resize

    @property
    def clusters(self) -> Clusters:
        mean, directions, centres = (
            self.tensors[name].double().numpy() for name in ("mean", "directions", "centres")
        )
        return Clusters(mean, directions, centres)

    def write(self, path: Path) -> None:
        meta = {
            "kind": self.kind,
            "classes": list(self.classes),
            "data_set": self.data_set,
            "size": self.size,
            "prototype": asdict(self.prototype),
            "step": self.step,
            "resize": self.resize,
        }
        tensors = {name: value.contiguous() for name, value in self.tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(save(tensors, {"format": _FORMAT, "head": json.dumps(meta)}))


def clusters_as_tensors(clusters: Clusters, class_of_cluster: Any) -> dict[str, Tensor]:
    """The tensors of a head of kind kmeans or pixel-kmeans."""
    arrays = {
        "mean": clusters.mean,
        "directions": clusters.directions,
        "centres": clusters.centres,
        "class_of_cluster": np.asarray(class_of_cluster, np.int64),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def read_head(path: Path) -> SavedHead:
    """Reads what `write` wrote.

    Raises:
        InputError: no such file, or another one, or its parts do not fit together.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is larger than any head")
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError("it is no head")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads(about["head"])
        known = {entry.name for entry in fields(PrototypeConfig)}
        head = SavedHead(
            kind=meta["kind"],
            tensors=tensors,
            classes=tuple(str(name) for name in meta["classes"]),
            data_set=str(meta["data_set"]),
            size=int(meta["size"]),
            prototype=PrototypeConfig(
                **{name: value for name, value in meta["prototype"].items() if name in known}
            ),
            step=int(meta["step"]),
            resize=meta["resize"],
        )
        _check(head)
    except FileNotFoundError:
        raise InputError(
            f"there is no file {path}; `maskbank evaluate kmeans` and `linear` write it"
        ) from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} holds no head ({error}); give kmeans-NETWORK.safetensors or "
            "linear-NETWORK.safetensors of a run's evaluation/ folder"
        ) from None
    return head


def _check(head: SavedHead) -> None:
    """Raises ValueError for parts that do not fit together."""
    if head.kind not in _TENSORS or set(_TENSORS[head.kind]) != set(head.tensors):
        raise ValueError(f"of kind {head.kind!r} with {', '.join(sorted(head.tensors))}")
    if head.resize not in RESIZES:
        raise ValueError(f"resize {head.resize!r}")
    if not 1 <= head.size <= 1 << 14 or len(head.classes) < 2:
        raise ValueError(f"size {head.size}, {len(head.classes)} classes")
    tensors = head.tensors
    if head.kind == "linear":
        count = len(head.classes)
        fits = tensors["weight"].dim() == 2 and len(tensors["weight"]) == count
        fits = fits and tensors["bias"].shape == (count,)
    else:
        mean, directions, centres = (tensors[n] for n in ("mean", "directions", "centres"))
        match = tensors["class_of_cluster"]
        fits = directions.shape == (*mean.shape, centres.shape[-1]) and centres.dim() == 2
        fits = fits and match.dim() == 1 and len(match) >= len(centres)
        fits = fits and bool((match < len(head.classes)).all())
    if not fits:
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        raise ValueError(f"its parts do not fit together: {shapes}")
