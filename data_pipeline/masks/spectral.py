"""Saliency from a self-supervised vision transformer: normalised cut over its patches.

TokenCut (Wang et al., "Self-Supervised Transformers for Unsupervised Object Discovery using
Normalized Cut", CVPR 2022, section 3): patches are nodes, two are joined where the keys of the last
attention layer have a cosine above τ; the second smallest generalised eigenvector of the graph's
Laplacian, cut at its mean, parts the picture in two.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from scipy.linalg import eigh
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.masks.predictor import Float32, UInt8

log = logging.getLogger(__name__)

Float64 = NDArray[np.float64]

TAU = 0.2  # cosine above which two patches are joined (section 4, implementation details)
EPSILON = 1e-5  # weight of all other edges (equation 3)
MAX_PATCHES = 6400  # a graph of more takes a GB, and half a minute to cut
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_WRAPPERS = ("teacher", "state_dict", "model")  # of checkpoints, around the network's tensors
_FIRST = "patch_embed.proj.weight"  # in every ViT; what is before it in a file is a prefix
# heads, and what comes after the keys: of no use here
_UNUSED = ("head.", "head_dist.", "norm.", "fc_norm.", "mask_token", "decoder")


class SpectralSaliency:
    """TokenCut's soft maps; a `Predictor`. Made by `load`.

    Attributes:
        name: method, network, and a digest of weights and settings.
        batch_size: pictures that go through the network together where they are resized to one
            shape; 1 on a CPU, where other batches give other roundings.
    """

    def __init__(
        self, network: Any, size: int, batch_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.name = "tokencut"
        self.network = network.eval()
        self.size = size
        self.patch: int = network.patch_embed.patch_size[0]
        self.device = next(network.parameters()).device
        self.batch_size = batch_size if self.device.type == "cuda" else 1
        self._mean = np.asarray(mean, np.float32)
        self._std = np.asarray(std, np.float32)

    @classmethod
    def load(
        cls,
        model: str,
        weights: Path | None,
        size: int = 480,
        batch_size: int = 8,
        device: str = "cpu",
    ) -> SpectralSaliency:
        """Builds a network of timm with the user's weights; nothing is downloaded.

        Args:
            model: timm's name of a plain ViT, as vit_small_patch16_224.dino. With a tag (after the
                dot), pictures are normalised as timm says for it; without, as ImageNet's, which is
                what DINO, DINOv2, iBOT, MoCo v3 and MAE do.
            weights: safetensors, or a torch file without objects; names of timm or of DINO, under
                any prefix, the teacher's where there are both.
            size: longest side that pictures are resized to, pixels, rounded to whole patches.
                Positional embeddings are interpolated as timm does.
            batch_size: pictures at a time on a GPU.
            device: cpu, cuda or cuda:N.

        Raises:
            InputError: an argument is out of range, or the weights are not those of the model;
                says what to do.
        """
        where = _device(device)
        if weights is None:
            raise InputError(
                "no weights were given, and none are downloaded: give the file of a "
                "self-supervised ViT, as DINO's dino_deitsmall16_pretrain.pth for the model "
                "vit_small_patch16_224.dino"
            )
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} is not at least 1")
        network = _create(model)
        _check_size(network.patch_embed.patch_size, size, model)
        load_weights(network, read_tensors(weights), weights, model)
        config = network.pretrained_cfg if "." in model else {}
        mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
        saliency = cls(network.to(where), size, batch_size, mean, std)
        digest = hashlib.sha256(repr((model, size, mean, std, TAU, EPSILON)).encode())
        with weights.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        saliency.name += f"-{model}-{digest.hexdigest()[:16]}"
        return saliency

    def predict(self, images: Sequence[UInt8]) -> list[Float32]:
        """Saliency in [0, 1], float32 [H, W], of each picture uint8 [H, W, 3].

        The object is above one half, exactly as TokenCut cuts it. A picture whose patches are all
        alike, or all apart, gets zeros.
        """
        maps: dict[int, Float32] = {}
        for shape, part in self._groups(images):
            keys = self._keys(torch.stack([self._prepare(images[i], shape) for i in part]))
            rows, columns = shape
            for index, features in zip(part, keys, strict=True):
                saliency = cut(features.reshape(rows, columns, -1))
                maps[index] = _resize(saliency, images[index].shape[:2])
        return [maps[index] for index in range(len(images))]

    def _groups(self, images: Sequence[UInt8]) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """Numbers of pictures of one shape in patches, rows and columns, a batch at the most."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            scale = self.size / max(image.shape[:2]) / self.patch
            rows, columns = (max(1, round(side * scale)) for side in image.shape[:2])
            shapes.setdefault((rows, columns), []).append(index)
        for shape, members in shapes.items():
            for start in range(0, len(members), self.batch_size):
                yield shape, members[start : start + self.batch_size]

    def _prepare(self, image: UInt8, shape: tuple[int, int]) -> Tensor:
        """The picture as the network takes it, [3, rows · patch, columns · patch]."""
        rows, columns = shape
        resized = Image.fromarray(image).resize(
            (columns * self.patch, rows * self.patch), Image.Resampling.BICUBIC
        )
        values = (np.asarray(resized, np.float32) / 255 - self._mean) / self._std
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    @torch.inference_mode()
    def _keys(self, pictures: Tensor) -> Float64:
        """Keys of the last attention layer, of all heads, of the patches, [B, N, D]."""
        found: list[Tensor] = []
        layer = self.network.blocks[-1].attn.qkv
        handle = layer.register_forward_hook(lambda _, __, output: found.append(output))
        try:
            self.network.forward_features(pictures.to(self.device))
        finally:
            handle.remove()
        keys = found[0].chunk(3, dim=-1)[1][:, self.network.num_prefix_tokens :]
        return keys.double().cpu().numpy()


def cut(features: Float64, tau: float = TAU, epsilon: float = EPSILON) -> Float32:
    """Parts patches in two by a normalised cut (TokenCut, sections 3.2 and 3.3).

    The side that holds the largest absolute value of the eigenvector is the object, unless it
    holds more than two of the picture's corners (a guard that is not in the paper); so the sign
    that a solver gives the eigenvector does not matter. All of that side is kept; the published
    code keeps the connected part with the largest value.

    Args:
        features: of patches, [rows, columns, D].
        tau: cosine above which two patches are joined.
        epsilon: weight of all other edges.

    Returns:
        float32 [rows, columns]: the eigenvector scaled linearly on either side of its mean, so
        that the mean is at one half, the object's end at 1 and the other at 0; zeros where the
        graph has nothing to cut.
    """
    rows, columns = features.shape[:2]
    nodes = features.reshape(rows * columns, -1)
    norms = np.linalg.norm(nodes, axis=1, keepdims=True)
    nodes = nodes / np.maximum(norms, np.finfo(np.float64).tiny)
    joined = nodes @ nodes.T > tau
    np.fill_diagonal(joined, True)
    count, edges = len(nodes), int(joined.sum())
    if edges in (count, count * count):  # no edge, or all of them: every vector is an eigenvector
        return np.zeros((rows, columns), np.float32)
    vector = second_eigenvector(np.where(joined, 1.0, epsilon))
    centred = (vector - vector.mean()).reshape(rows, columns)
    seed = int(np.abs(vector).argmax())
    if centred.flat[seed] < 0:
        centred = -centred
    corners = centred[[0, 0, -1, -1], [0, -1, 0, -1]]
    if (corners > 0).sum() > 2:
        centred = -centred
    scale = np.where(centred > 0, centred.max(), -centred.min())
    return np.asarray(0.5 + 0.5 * centred / scale, np.float32)


def second_eigenvector(affinity: Float64) -> Float64:
    """The v [N] of the second smallest λ in (D - W) v = λ D v, for symmetric W [N, N] (equation 2).

    v = D^-½ u, where u is the eigenvector of the second largest eigenvalue of D^-½ W D^-½.
    """
    root = np.sqrt(affinity.sum(1))
    count = len(root)
    normalised = affinity / root[:, None] / root[None]
    _, vectors = eigh(normalised, subset_by_index=[count - 2, count - 2], overwrite_a=True)
    return np.asarray(vectors[:, 0] / root)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, without what wraps them; unpickles no objects.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise InputError(f"weights {path} {what}; give a safetensors or torch file")
    try:
        if path.suffix == ".safetensors":
            raw: Any = load_file(path)
        else:
            # DINO's full checkpoints hold their arguments, which are a plain record
            with torch.serialization.safe_globals([argparse.Namespace]):
                raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the safe unpickler raises anything on a stranger's bytes
        raise InputError(
            f"weights {path} cannot be read as tensors ({_reason(error)}); "
            "expected safetensors or a state dict"
        ) from None
    while isinstance(raw, dict):
        inner = next((raw[key] for key in _WRAPPERS if isinstance(raw.get(key), dict)), None)
        if inner is None:
            break
        raw = inner
    items = raw.items() if isinstance(raw, dict) else ()
    state = {str(key): value for key, value in items if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"weights {path} hold no named tensors; give a ViT's state dict")
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"weights {path}: {key} has NaN or infinite values; copy it here anew")
    return _without_prefix(state)


def load_weights(network: Any, state: dict[str, Tensor], path: Path, model: str) -> None:
    """Loads all tensors that keys depend on, after timm has brought names and positions to its own.

    Raises:
        InputError: `state` is another network's; names what is missing, unexpected or of another
            shape.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    advice = f"give the model whose weights they are, instead of {model}"
    own = network.state_dict()
    kernel = state.get(_FIRST)
    if kernel is not None and kernel.ndim == 4 and kernel.shape != own[_FIRST].shape:
        raise InputError(  # timm would resample patches of another size, silently
            f"weights {path}: {_FIRST} is {list(kernel.shape)}, that of {model} "
            f"{list(own[_FIRST].shape)}; {advice}"
        )
    try:
        state = checkpoint_filter_fn(dict(state), network)  # it takes entries out
    except Exception as error:  # made for timm's own files: raises anything on others
        raise InputError(f"weights {path} are not a ViT's ({_reason(error)}); {advice}") from None
    state = {key: value for key, value in state.items() if not key.startswith(_UNUSED)}
    missing = [key for key in own if key not in state and not key.startswith(_UNUSED)]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if missing or unexpected or reshaped:
        raise InputError(
            f"weights {path} do not fit {model}: missing {_short(missing)}; unexpected "
            f"{_short(unexpected)}; of another shape {_short(reshaped)}; {advice}"
        )
    network.load_state_dict(state, strict=False)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one ViT under its own names: of several, the teacher's, or else the first."""
    prefixes = sorted({key.removesuffix(_FIRST) for key in state if key.endswith(_FIRST)})
    if not prefixes:
        return state
    prefix = next((prefix for prefix in prefixes if "teacher" in prefix), prefixes[0])
    if len(prefixes) > 1:
        log.info("several networks in one file (%s): %r is taken", ", ".join(prefixes), prefix)
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def _create(model: str) -> Any:
    """An untrained ViT of timm; names that timm would look up elsewhere are refused."""
    try:
        import timm
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise InputError(
            f"spectral masks need timm ({error}): pip install 'maskbank[masks]' installs it"
        ) from None
    plain = "expected a plain ViT of timm, as vit_small_patch16_224.dino"
    if not re.fullmatch(r"[A-Za-z0-9_.]+", model) or not timm.is_model(model):
        near = ", ".join(timm.list_models(f"{model[:6]}*")[:5]) if model.isidentifier() else ""
        raise InputError(
            f"timm has no model {model!r}; {plain}" + (f" (near: {near})" if near else "")
        )
    try:
        network: Any = timm.create_model(
            model, pretrained=False, num_classes=0, dynamic_img_size=True
        )
    except Exception as error:  # models of other kinds refuse the arguments in ways of their own
        raise InputError(f"the model {model} cannot be used ({_reason(error)}); {plain}") from None
    attention = getattr(network.blocks[-1], "attn", None) if hasattr(network, "blocks") else None
    square = (
        isinstance(network, VisionTransformer) and len(set(network.patch_embed.patch_size)) == 1
    )
    if not square or not isinstance(getattr(attention, "qkv", None), torch.nn.Linear):
        raise InputError(f"the model {model} is not one with keys and square patches; {plain}")
    return network


def _check_size(patch: tuple[int, int], size: int, model: str) -> None:
    if size < 2 * patch[0]:
        raise InputError(
            f"size {size} is less than two patches of {patch[0]} pixels; give at least "
            f"{2 * patch[0]} for {model}"
        )
    if round(size / patch[0]) ** 2 > MAX_PATCHES:
        raise InputError(
            f"size {size} gives {round(size / patch[0]) ** 2:,} patches of {patch[0]} pixels, more "
            f"than {MAX_PATCHES:,}; give at most {int(MAX_PATCHES**0.5) * patch[0]} for {model}"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"there is no device {name!r}; it can be one of: cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name}: torch sees {torch.cuda.device_count()} GPUs; take the device cpu"
        )
    return device


def _resize(values: Float32, shape: Sequence[int]) -> Float32:
    """A map [rows, columns] at the picture's size [H, W]."""
    resized = Image.fromarray(values).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(np.clip(np.asarray(resized), 0, 1), np.float32)


def _short(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4]) or "none"
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
