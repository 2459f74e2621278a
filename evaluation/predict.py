"""Class maps of images of any size, by a network and what an evaluation learned on top of it.

    predictor = Predictor(load_encoder("runs/voc"), read_head(Path("…/kmeans-trained.safetensors")))
    prediction = predictor.predict(image)  # uint8 [H, W, 3]

An image is resized as for the evaluation that made the head, whose figure holds for these
predictions to the pixel (where only the centre was scored, all of the image is predicted at that
scale); or it is taken at its own size, in tiles where it is large.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import InputError
from data_pipeline.resize import Resize, require_resize, resize_image, resize_nearest
from data_pipeline.sample import Label, UInt8
from data_pipeline.whole_images import normalise
from evaluation.features import forward, require_precision
from evaluation.pixel_kmeans import nearest_centres
from evaluation.prototypes import PrototypeConfig, foreground_of, image_prototypes
from evaluation.saved_head import SavedHead
from evaluation.tiles import Tile, tiles
from trainer.encoder import Encoder
from trainer.model import upsample

SALIENCY_CLASSES = ("background", "object")
_LEARN = (
    "give --head a file of `maskbank evaluate linear`, or of `evaluate kmeans --unit pixel`, which "
    "need none"
)
_LOGITS = 1 << 26  # upsampled at a time
Size = tuple[int, int]


@dataclass(frozen=True)
class Prediction:
    """What was predicted on an image [H, W].

    Attributes:
        classes: int16 [H, W]; -1 where a cluster has no class.
        saliency: float32 [H, W], probability of an object; None where the network has no such head,
            or it was not asked for.
        vector: float32 [D], of unit length: of the foreground (zero where there is none), or of the
            whole image where the network predicts no saliency. None as `embedding`.
        embedding: float16 [D, h, w] at the stride, not normalised; None if it was not asked for.
    """

    classes: Label
    saliency: NDArray[np.float32] | None
    vector: NDArray[np.float32] | None
    embedding: NDArray[np.float16] | None


@dataclass(frozen=True)
class PredictConfig:
    """How images are predicted.

    Attributes:
        size: side that images are resized to, pixels; None: that of the head, or 512.
        resize: how (`resize_image`); None: as the head, or opencv.
        whole: images keep their size instead, padded to the network's stride.
        max_side: of whole images, pixels; larger ones are cut into tiles of this side.
        overlap: pixels that neighbouring tiles share.
        threshold: probability above which a pixel is an object, where there is no head.
        precision: float32 or bf16.
        saliency, embedding: whether predictions have them.
    """

    size: int | None = None
    whole: bool = False
    max_side: int = 1024
    overlap: int = 128
    threshold: float = 0.5
    precision: str = "float32"
    saliency: bool = True
    embedding: bool = True
    resize: Resize | None = None

    def __post_init__(self) -> None:
        require_precision(self.precision)
        if self.resize is not None:
            require_resize(self.resize)
        if self.size is not None and not 1 <= self.size <= 1 << 14:
            raise InputError(f"--size is {self.size}; it can be 1 to {1 << 14} pixels")
        if self.max_side < 64 or not 0 <= self.overlap <= self.max_side // 2:
            raise InputError(
                f"--max-side {self.max_side} must be at least 64, and --overlap {self.overlap} "
                "0 to half of it"
            )
        if not 0 < self.threshold < 1:
            raise InputError(f"--threshold is {self.threshold}; it is a probability")


@dataclass(frozen=True)
class _Maps:
    """Of a batch, at the stride: [B, C, h, w], [B, D, h, w], and logits [B, 1, h, w].

    `size` is that of its images, pixels.
    """

    size: Size
    features: Tensor | None
    embedding: Tensor | None
    saliency: Tensor | None


class Predictor:
    """Predicts the classes of a head, or without one binary saliency masks.

    Args:
        encoder: the network; it is moved to the device.
        head: of `maskbank evaluate kmeans` or `linear`, made on this network.
        device: cpu or cuda.
        config: how.

    Raises:
        InputError: the head does not fit the network, or needs what the network has not.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: SavedHead | None = None,
        device: torch.device | str = "cpu",
        config: PredictConfig | None = None,
    ) -> None:
        self.config = config or PredictConfig()
        self.device = torch.device(device)
        _require_fit(encoder, head)
        self.encoder, self.head = encoder, head
        self.encoder.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.kind = "saliency" if head is None else head.kind
        self.classes = SALIENCY_CLASSES if head is None else head.classes
        self.size = self.config.size or (512 if head is None else head.size)
        self.resize: Resize = self.config.resize or ("opencv" if head is None else head.resize)
        self.prototype = (
            PrototypeConfig("probability", self.config.threshold, "normalized")
            if head is None
            else head.prototype
        )
        self._salient = "saliency" in encoder.parts
        if not self._salient or self.prototype.foreground == "mask":
            self.prototype = PrototypeConfig("probability", pooling="normalized")
        self._by_foreground = self.kind in ("saliency", "kmeans")
        self._vectors = self.config.embedding or self.kind == "kmeans"
        if head is not None and head.kind != "linear":
            self._clusters = head.clusters
            self._match = head.tensors["class_of_cluster"].numpy().astype(np.int16)
        elif head is not None:
            self._weight = head.tensors["weight"].float().to(self.device)[:, :, None, None]
            self._bias = head.tensors["bias"].float().to(self.device)
            own = encoder.classifier
            # the evaluation keeps features in bf16 to learn on them, but not for a network's own
            same = own is not None and torch.equal(
                own[0].float().flatten(1), self._weight.flatten(1)
            )
            self._kept_as = torch.float32 if same else torch.bfloat16

    def predict(self, image: UInt8) -> Prediction:
        """The prediction on an image, uint8 [H, W, 3] (RGB)."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"an image is uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        if self.config.whole:
            return self._predict_whole(image)
        return next(self.predict_resized([self.resized(image)], [image.shape[:2]]))

    def resized(self, image: UInt8) -> Tensor:
        """The image, uint8 [H, W, 3], as the network sees it: uint8 [3, h, w], mostly S × S."""
        return resize_image(image, self.size, self.resize)

    def predict_resized(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, ...]]
    ) -> Iterator[Prediction]:
        """Predictions of a batch, one after the other.

        Args:
            images: as `resized` made them, uint8 [3, h, w].
            sizes: their own (H, W), which predictions have.
        """
        alike = len({one.shape for one in images}) == 1
        for batch in [images] if alike else [[one] for one in images]:
            maps = self._forward(torch.stack(list(batch)))
            saliency, vectors, values = self._values(maps)
            for i, (height, width) in enumerate(sizes[: len(batch)]):
                yield self._prediction(maps, saliency, vectors, values, i, (height, width))
            sizes = sizes[len(batch) :]

    @torch.inference_mode()
    def _forward(self, pixels: Tensor) -> _Maps:
        """The network's output for pixels uint8 [B, 3, h, w]."""
        images = normalise(pixels.to(self.device)).contiguous(memory_format=torch.channels_last)
        network, features = self.encoder.network, None
        size = (pixels.shape[2], pixels.shape[3])
        how = self.config.precision
        if self.kind == "linear":
            features = forward(network.features, images, how)
            if not (self._vectors or (self.config.saliency and self._salient)):
                return _Maps(size, features, None, None)
            output = forward(network.heads, features, how)
        else:
            output = forward(network, images, how)
        return _Maps(size, features, output.embedding, output.saliency if self._salient else None)

    @torch.inference_mode()
    def _values(self, maps: _Maps) -> tuple[Tensor | None, NDArray[np.float32] | None, Tensor]:
        """Saliency logits [B, *size], vectors [B, D], and what pixels are told apart by.

        That is the foreground, uint8 [B, *size], clusters, int16 [B, *size], or of a linear
        classifier the features [B, C, h, w].
        """
        size = maps.size
        saliency = None if maps.saliency is None else upsample(maps.saliency, size)[:, 0]
        vectors, foreground = None, None
        if saliency is not None and self._vectors and maps.embedding is not None:
            prototypes, foreground = image_prototypes(maps.embedding, saliency, self.prototype)
            vectors = prototypes.float().cpu().numpy()
        elif self._vectors and maps.embedding is not None:
            directions = F.normalize(maps.embedding.float(), dim=1)
            vectors = F.normalize(directions.sum((2, 3)), dim=1).cpu().numpy()
        if self._by_foreground:
            assert saliency is not None
            if foreground is None:
                foreground = foreground_of(saliency, self.prototype)
            return saliency, vectors, foreground.to(torch.uint8).cpu()
        if self.kind == "linear":
            assert maps.features is not None
            return saliency, vectors, maps.features
        assert maps.embedding is not None
        return saliency, vectors, self._nearest(maps.embedding, size)

    @torch.inference_mode()
    def _prediction(
        self,
        maps: _Maps,
        saliency: Tensor | None,
        vectors: NDArray[np.float32] | None,
        values: Tensor,
        i: int,
        size: Size,
    ) -> Prediction:
        vector = None if vectors is None else vectors[i]
        if self._by_foreground:
            classes = self._classes_of(vector)[resize_nearest(values[i], size).numpy()]
        elif self.kind == "pixel-kmeans":
            classes = self._match[resize_nearest(values[i], size).numpy()]
        else:
            decided = self._classify(values[i : i + 1], maps.size)
            classes = resize_nearest(torch.from_numpy(decided), size).numpy()
        probability = None
        if saliency is not None and self.config.saliency:
            logits = upsample(saliency[i : i + 1, None], size)
            probability = logits[0, 0].sigmoid().cpu().numpy()
        embedding = None
        if self.config.embedding and maps.embedding is not None:
            embedding = _half(maps.embedding[i])
        return Prediction(classes, probability, vector, embedding)

    @torch.inference_mode()
    def _predict_whole(self, image: UInt8) -> Prediction:
        """Tile by tile; each decides on its own core, what is around that is context."""
        height, width = image.shape[:2]
        classes = np.zeros((height, width), np.int16)
        keep = self.config.saliency and self._salient
        saliency = np.zeros((height, width), np.float32) if keep else None
        embedding: NDArray[np.float16] | None = None
        total: Tensor | float = 0.0
        stride = self.encoder.network.config.output_stride
        for tile in tiles(height, width, self.config.max_side, self.config.overlap, stride):
            maps = self._forward(tile.cut(image, stride))
            size = tile.padded(stride)
            logits = None if maps.saliency is None else upsample(maps.saliency, size)
            inside = tile.core_mask(size).to(self.device)
            if self._vectors and maps.embedding is not None:
                total = total + self._pooled(maps.embedding, logits, inside)
            classes[tile.target] = self._tile_values(maps, logits, size)[tile.core]
            if saliency is not None and logits is not None:
                saliency[tile.target] = logits[0, 0].sigmoid().cpu().numpy()[tile.core]
            if self.config.embedding and maps.embedding is not None:
                embedding = _paste(embedding, maps.embedding[0], tile, image.shape[:2], size)
        vector = F.normalize(total, dim=0).float() if isinstance(total, Tensor) else None
        found = None if vector is None else vector.cpu().numpy()
        if self._by_foreground:
            classes = self._classes_of(found)[classes]
        return Prediction(classes, saliency, found, embedding)

    def _tile_values(self, maps: _Maps, logits: Tensor | None, size: Size) -> NDArray[np.int16]:
        """Classes of a tile's pixels, or 1 for its foreground, int16 [h, w]."""
        if self._by_foreground:
            assert logits is not None
            foreground = foreground_of(logits[:, 0], self.prototype)[0]
            return foreground.to(torch.int16).cpu().numpy()
        if self.kind == "linear":
            assert maps.features is not None
            return self._classify(maps.features, size)
        assert maps.embedding is not None
        classes: NDArray[np.int16] = self._match[self._nearest(maps.embedding, size)[0].numpy()]
        return classes

    def _pooled(self, embedding: Tensor, logits: Tensor | None, inside: Tensor) -> Tensor:
        """What a tile adds to the image's vector before that is normalised, float64 [D]."""
        if logits is None:
            rows, columns = embedding.shape[2:]
            share = F.adaptive_avg_pool2d(inside[None, None].float(), (rows, columns))
            weight = share[:, 0]
            embedding = F.normalize(embedding.float(), dim=1)
        else:
            saliency = logits[:, 0]
            foreground = foreground_of(saliency, self.prototype) & inside
            embedding = upsample(embedding, (inside.shape[0], inside.shape[1]))
            if self.prototype.pooling == "weighted":
                weight = saliency * foreground
            else:
                embedding, weight = F.normalize(embedding, dim=1), foreground.float()
        return torch.einsum("bdhw,bhw->d", embedding, weight).double()

    def _classes_of(self, vector: NDArray[np.float32] | None) -> NDArray[np.int16]:
        """Classes outside and inside the foreground of an image with this vector, int16 [2]."""
        if self.kind == "saliency":
            return np.array([0, 1], np.int16)
        assert vector is not None
        empty = np.abs(vector).sum() == 0
        cluster = 0 if empty else 1 + int(self._clusters.assign(vector[None])[0])
        classes: NDArray[np.int16] = self._match[[0, cluster]]
        return classes

    def _nearest(self, embedding: Tensor, size: Size) -> Tensor:
        """Cluster of each pixel, int16 [B, *size], on the CPU."""
        directions = F.normalize(upsample(embedding, size).float(), dim=1)
        return nearest_centres(directions, self._clusters).to(torch.int16).cpu()

    def _classify(self, features: Tensor, size: Size) -> NDArray[np.int16]:
        """Class of each pixel, int16 [*size], of features [1, C, h, w]."""
        kept = features.to(self._kept_as).float()
        logits = F.conv2d(kept, self._weight, self._bias)
        return largest_channel(logits, size)


def largest_channel(logits: Tensor, size: Size, at_once: int = _LOGITS) -> NDArray[np.int16]:
    """The first of the largest channels of logits [1, C, h, w] after upsampling, int16 [H, W].

    Args:
        logits: of classes.
        size: (H, W).
        at_once: values that are upsampled at a time, as all classes of a large image are too many.
    """
    count = max(1, at_once // (size[0] * size[1]))
    best, winner = None, None
    for first in range(0, logits.shape[1], count):
        values, channels = upsample(logits[:, first : first + count], size).max(1)
        if best is None or winner is None:
            best, winner = values, channels.to(torch.int16)
            continue
        better = values > best
        best = torch.where(better, values, best)
        winner = torch.where(better, (channels + first).to(torch.int16), winner)
    assert winner is not None
    found: NDArray[np.int16] = winner[0].cpu().numpy()
    return found


def _require_fit(encoder: Encoder, head: SavedHead | None) -> None:
    if head is None:
        encoder.require("saliency", "a prediction without --head", _LEARN)
        return
    config = encoder.network.config
    if head.kind == "linear":
        name, has, needs = "features", config.decoder_channels, head.tensors["weight"].shape[1]
    else:
        name, has, needs = "embeddings", config.embedding_dim, len(head.tensors["mean"])
    if has != needs:
        raise InputError(
            f"the head is of a network with {needs} {name}, {encoder.origin} has {has}; give the "
            "network that it was made on, or evaluate this one"
        )
    if head.kind == "kmeans":
        if head.prototype.foreground == "mask":
            raise InputError(
                "the head was made on the data set's own saliency masks (--foreground mask), which "
                "other images have not; evaluate with --foreground probability, or --unit pixel"
            )
        encoder.require("saliency", "a head of images' foregrounds", _LEARN)


def _half(embedding: Tensor) -> NDArray[np.float16]:
    """float16, on the CPU; what is too large becomes the largest there is."""
    limit = torch.finfo(torch.float16).max
    found: NDArray[np.float16] = (
        embedding.float().clamp(-limit, limit).to(torch.float16).cpu().numpy()
    )
    return found


def _paste(
    whole: Any, embedding: Tensor, tile: Tile, image: tuple[int, ...], padded: Size
) -> NDArray[np.float16]:
    """Puts the core of a tile's embedding [D, h, w] where it belongs in that of the image."""
    stride = padded[0] // embedding.shape[1]
    if whole is None:
        rows, columns = (-(-length // stride) for length in image)
        whole = np.zeros((len(embedding), rows, columns), np.float16)
    target, core = ((_at_stride(s, stride) for s in place) for place in (tile.target, tile.core))
    (top, left), (from_top, from_left) = target, core
    whole[:, top, left] = _half(embedding)[:, from_top, from_left]
    pasted: NDArray[np.float16] = whole
    return pasted


def _at_stride(pixels: slice, stride: int) -> slice:
    return slice(pixels.start // stride, -(-pixels.stop // stride))
