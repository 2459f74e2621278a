"""Video object segmentation on DAVIS-2016: what frozen features and saliency know of one object.

Three readings, all of them ours: the network's saliency as it is; a linear foreground classifier,
learned on the training sequences; the first frame's mask, propagated by the similarity of features
(Jabri et al., NeurIPS 2020, section 4.1). Each is scored by J and F (`video_metrics.py`).
"""

import heapq
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, tee
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import InputError
from data_pipeline.labelled import LabelledSet
from data_pipeline.pictures import encode_png
from data_pipeline.resize import Resize, require_resize, resize_nearest
from data_pipeline.sample import safe_key
from data_pipeline.whole_images import WholeImage, WholeImages, normalise
from evaluation.features import precision, require_pixels, require_precision, shown
from evaluation.label_propagation import PropagationConfig, propagate
from evaluation.miou import Counts, confusion, foreground_iou, score
from evaluation.prototypes import PrototypeConfig, foreground_of
from evaluation.result import Result
from evaluation.saved_head import SavedHead
from evaluation.video_metrics import by_sequence, davis_scores, frame_measures, sequence_scores
from trainer.distributed import Ranks, all_reduce_sum
from trainer.encoder import Encoder
from trainer.model import upsample

Reading = Literal["saliency", "classifier", "propagation"]
Mask = NDArray[np.bool_]
Segmenter = Callable[[Iterator[WholeImage]], Iterator[Mask]]  # a sequence's frames to its objects

READINGS: tuple[Reading, ...] = ("saliency", "classifier", "propagation")
_LEAST_FRAMES = 3  # the first and the last do not count
_CLASSES = ("background", "object")
_FIGURES = {
    "jf_mean": "J&F",
    **{f"{one.lower()}_{what}": f"{one} {what}" for one in "JF" for what in ("mean", "recall")},
    **{f"{one.lower()}_decay": f"{one} decay" for one in "JF"},
}


@dataclass(frozen=True)
class VideoConfig:
    """How videos are segmented.

    Attributes:
        size: side that frames are resized to for saliency, pixels; a classifier has its own, and
            propagation takes frames as they are.
        prototype: what of the saliency is foreground.
        features: that propagation compares: embedding or decoder, at the network's stride.
        propagation: how.
        precision: float32 or bf16.
        resize: of frames for saliency (`resize_image`); a classifier has its own.
    """

    size: int = 512
    prototype: PrototypeConfig = field(default_factory=PrototypeConfig)
    features: Literal["embedding", "decoder"] = "embedding"
    propagation: PropagationConfig = field(default_factory=PropagationConfig)
    precision: str = "float32"
    resize: Resize = "opencv"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"--size is {self.size}; it must be at least 1")
        if self.features not in ("embedding", "decoder"):
            raise InputError(f"--features is {self.features!r}; it can be embedding or decoder")
        if self.prototype.foreground == "mask":
            raise InputError("--foreground is 'mask'; of videos it can be logit or probability")
        require_precision(self.precision)
        require_resize(self.resize)
        if self.resize == "crop":
            raise InputError("--resize is 'crop'; whole frames are scored: opencv or antialias")


def evaluate_video(
    encoder: Encoder,
    samples: LabelledSet,
    reading: Reading,
    config: VideoConfig,
    ranks: Ranks,
    network: str = "trained",
    threads: int = 2,
    head: SavedHead | None = None,
    write: Path | None = None,
) -> Result:
    """J and F of one reading, on every rank the same, whatever their number; a collective.

    Args:
        encoder: the network.
        samples: frames with keys SEQUENCE/FRAME; every label above 0 is the object.
        reading: saliency, classifier or propagation.
        config: how.
        ranks: that share the sequences.
        network: its name in the result.
        threads: frames that are read at a time.
        head: the linear classifier of that reading.
        write: folder for the masks: READING/SEQUENCE/FRAME.png, object 255.

    Raises:
        InputError: no videos, too short ones, or the network or head does not fit the reading.
    """
    start = time.monotonic()
    sequences = sequences_of(samples)
    segment, options = _segmenter(encoder, reading, config, head, ranks)
    shape: tuple[int, Resize] = config.size, config.resize
    if reading == "classifier" and head is not None:
        shape = head.size, head.resize
    size, resize = (1, config.resize) if reading == "propagation" else shape
    images = WholeImages(samples, size, threads, resize)
    encoder.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    folder = None if write is None else write / f"davis-{reading}"
    measures, matrix = _measured(images, sequences, segment, ranks, reading, folder)
    require_pixels(matrix, samples)
    by_name = by_sequence([samples.key(number) for number in range(len(samples))], measures)
    inner, every = davis_scores(by_name), davis_scores(by_name, "all")
    metrics: dict[str, tuple[float, ...]] = {}
    for figure, name in _FIGURES.items():
        if figure != "jf_mean":  # the result's own value
            metrics[name] = (inner[figure],)
        metrics[f"{name}, all frames"] = (every[figure],)
    scored = score(matrix)
    return Result(
        protocol=f"davis-{reading}",
        network=network,
        step=encoder.step,
        values=(inner["jf_mean"],),
        iou=scored.iou,
        confusion=matrix,
        foreground_iou=foreground_iou(matrix),
        pixel_accuracy=scored.pixel_accuracy,
        classes=_CLASSES,
        images=len(samples),
        seconds=time.monotonic() - start,
        options=options,
        metrics=metrics,
        measure="J&F",
        parts={name: _figures_of(name, values) for name, values in by_name.items()},
    )


def sequences_of(samples: LabelledSet) -> dict[str, list[int]]:
    """Sample numbers of each sequence's frames, in order of their names; sequences sorted.

    Raises:
        InputError: keys name no sequences, or a sequence is too short to be scored.
    """
    frames: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for number in range(len(samples)):
        key = samples.key(number)
        sequence, _, frame = key.rpartition("/")
        if not sequence:
            raise InputError(
                f"{samples} holds no videos: its sample {key} names no sequence; give frames with "
                "keys SEQUENCE/00000, as `shards build davis` makes them, or --data-set davis-2016"
            )
        frames[sequence].append((frame, number))
    short = sorted(name for name, found in frames.items() if len(found) < _LEAST_FRAMES)
    if short:
        raise InputError(
            f"{samples}: {len(short)} of {len(frames)} sequences have fewer than {_LEAST_FRAMES} "
            f"frames, of which the first and last do not count: {', '.join(short[:3])}; give whole "
            "sequences"
        )
    return {name: [number for _, number in sorted(frames[name])] for name in sorted(frames)}


def deal(sequences: dict[str, list[int]], world_size: int) -> list[list[str]]:
    """The sequences of each rank: the longest first, each to the rank with the fewest frames."""
    load = [(0, rank) for rank in range(world_size)]
    dealt: list[list[str]] = [[] for _ in range(world_size)]
    for name in sorted(sequences, key=lambda name: (-len(sequences[name]), name)):
        frames, rank = heapq.heappop(load)
        dealt[rank].append(name)
        heapq.heappush(load, (frames + len(sequences[name]), rank))
    return dealt


def _measured(
    images: WholeImages,
    sequences: dict[str, list[int]],
    segment: Segmenter,
    ranks: Ranks,
    title: str,
    folder: Path | None,
) -> tuple[NDArray[np.float64], Counts]:
    """J and F of every frame [N, 2], and pixels by truth and prediction [2, 2], over all ranks."""
    measures = np.zeros((len(images), 2))
    matrix = np.zeros((2, 2), np.int64)
    own = deal(sequences, ranks.world_size)[ranks.rank]

    def predicted() -> Iterator[tuple[WholeImage, Mask]]:
        for name in own:
            numbers = np.array(sequences[name], np.int64)
            batches = images.batches(numbers, images.threads)
            frames, given = tee(frame for batch in batches for frame in batch)
            yield from zip(frames, segment(given), strict=True)

    total = sum(len(sequences[name]) for name in own)
    for frame, mask in shown(predicted(), title, total, ranks):
        truth = np.minimum(frame.label, 1)
        measures[frame.sample_id] = frame_measures(truth, mask)
        matrix += confusion(truth, mask.astype(np.int64), 2, 2)
        if folder is not None:
            _write_mask(folder / f"{safe_key(frame.key)}.png", mask)
    # every row is of one rank and 0 on the others, so that their sum is exact
    for values in (measures, matrix):
        on_device = torch.from_numpy(values).to(ranks.device)
        values[...] = all_reduce_sum(on_device, ranks).cpu().numpy()
    return measures, matrix


def _write_mask(path: Path, mask: Mask) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.where(mask, np.uint8(255), np.uint8(0))))


def _figures_of(sequence: str, measures: NDArray[np.float64]) -> dict[str, float]:
    scores = sequence_scores(sequence, measures)
    named = {name: round(scores[figure], 4) for figure, name in _FIGURES.items()}
    return {**named, "frames": len(measures)}


def require_reading(encoder: Encoder, reading: Reading, head: SavedHead | None) -> None:
    """Raises InputError where the network or the head cannot do it: said before any work."""
    if reading == "saliency" and "saliency" not in encoder.parts:
        raise InputError(
            f"{encoder.origin} has no saliency head; leave that reading out: --readings "
            "classifier,propagation"
        )
    width = encoder.network.config.decoder_channels
    if reading == "classifier" and head is not None:
        shapes = {name: list(value.shape) for name, value in head.tensors.items()}
        if head.kind != "linear" or head.tensors["weight"].shape[1] != width:
            raise InputError(
                f"the head ({head.kind}, {shapes}) is no linear classifier on {width} features of "
                f"{encoder.origin}; give --head the linear-NETWORK.safetensors of this network, or "
                "leave it out to learn one"
            )


def _segmenter(
    encoder: Encoder, reading: Reading, config: VideoConfig, head: SavedHead | None, ranks: Ranks
) -> tuple[Segmenter, dict[str, Any]]:
    """What segments a sequence, and the options that decide it."""
    require_reading(encoder, reading, head)
    named: dict[str, Any] = {"precision": config.precision}
    if reading == "saliency":
        options = {"size": config.size, "prototype": asdict(config.prototype)}
        options["resize"] = config.resize
        return _by_saliency(encoder, config, ranks), named | options
    if reading == "classifier":
        assert head is not None
        options = {"size": head.size, "resize": head.resize}
        return _by_classifier(encoder, head, config, ranks), named | options
    options = {"features": config.features, "propagation": asdict(config.propagation)}
    return _by_propagation(encoder, config, ranks), named | options


def _by_saliency(encoder: Encoder, config: VideoConfig, ranks: Ranks) -> Segmenter:
    @torch.inference_mode()
    def one(frame: WholeImage) -> Mask:
        with precision(config.precision, ranks.device):
            logits = encoder.network(_on_device(frame.pixels, ranks)).saliency
        foreground = foreground_of(upsample(logits, frame.label.shape)[:, 0], config.prototype)
        found: Mask = foreground[0].cpu().numpy()
        return found

    return lambda frames: map(one, frames)


def _by_classifier(
    encoder: Encoder, head: SavedHead, config: VideoConfig, ranks: Ranks
) -> Segmenter:
    weight = head.tensors["weight"].to(ranks.device).float()[:, :, None, None]
    bias = head.tensors["bias"].to(ranks.device).float()

    @torch.inference_mode()
    def one(frame: WholeImage) -> Mask:
        with precision(config.precision, ranks.device):
            features = encoder.network.features(_on_device(frame.pixels, ranks))
        # decided at the square, as linear classifiers are scored
        logits = upsample(F.conv2d(features.float(), weight, bias), (head.size, head.size))
        height, width = frame.label.shape
        found: Mask = resize_nearest(logits.argmax(1)[0].cpu(), (height, width)).numpy() > 0
        return found

    return lambda frames: map(one, frames)


def _by_propagation(encoder: Encoder, config: VideoConfig, ranks: Ranks) -> Segmenter:
    def segment(frames: Iterator[WholeImage]) -> Iterator[Mask]:
        first = next(frames)
        height, width = first.label.shape
        _, right, _, bottom = _padding(height, width, encoder.network.config.output_stride)
        # continued as the image is, so that the shares in a cell at the edge add up to one
        mask = np.pad(np.minimum(first.label, 1), ((0, bottom), (0, right)), mode="edge")
        features = (
            frozen_frame(encoder, frame.image, config, ranks) for frame in chain([first], frames)
        )
        for ids in propagate(features, torch.from_numpy(mask), config.propagation):
            found: Mask = ids[:height, :width].cpu().numpy() > 0
            yield found

    return segment


@torch.inference_mode()
def frozen_frame(
    encoder: Encoder, image: NDArray[np.uint8], config: VideoConfig, ranks: Ranks
) -> Tensor:
    """Features [C, h, w] at the stride of a frame [H, W, 3], continued to whole strides."""
    padding = _padding(image.shape[0], image.shape[1], encoder.network.config.output_stride)
    pixels = _on_device(torch.tensor(image).permute(2, 0, 1), ranks)
    pixels = F.pad(pixels, padding, mode="replicate")
    with precision(config.precision, ranks.device):
        if config.features == "decoder":
            return encoder.network.features(pixels)[0]
        embedding: Tensor = encoder.network(pixels).embedding[0]
    return embedding


def _padding(height: int, width: int, stride: int) -> tuple[int, int, int, int]:
    """Pixels to add (left, right, top, bottom) for whole strides."""
    return 0, -width % stride, 0, -height % stride


def _on_device(pixels: Tensor, ranks: Ranks) -> Tensor:
    """uint8 [3, H, W] to a batch of one, normalised."""
    images = normalise(pixels[None].to(ranks.device))
    return images.contiguous(memory_format=torch.channels_last)
