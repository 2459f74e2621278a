"""Linear classifier evaluation (MaskContrast, section 4.2): a 1×1 on frozen decoder features."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from data_pipeline.errors import InputError
from data_pipeline.labelled import LabelledSet
from data_pipeline.order import generator
from data_pipeline.whole_images import (
    IGNORED,
    Label,
    WholeImage,
    WholeImages,
    normalise,
    resize_nearest,
)
from evaluation.features import (
    own_batches,
    own_samples,
    precision,
    require_pixels,
    require_precision,
    shown,
)
from evaluation.memory import available_memory, require_memory
from evaluation.miou import Counts, Score, confusion, foreground_iou, score
from evaluation.result import Result
from trainer.distributed import Ranks, all_reduce_sum
from trainer.encoder import Encoder
from trainer.model import upsample

_ORDER, _AUGMENT = 11, 12  # streams of the generator
_Example = tuple[Tensor, Tensor]  # features [C, h, w] or pixels [3, S, S], label int16 [S, S]


@dataclass(frozen=True)
class LinearConfig:
    """The protocol; the defaults are the published ones.

    Attributes:
        size: side that images are resized to, pixels.
        epochs, batch_size, lr, momentum, weight_decay: of SGD.
        decay_epoch: after which the rate is a tenth.
        augment: flip, rotation of ±5°, scale .75–1.25. Without, features are computed only once.
        select: best epoch on the evaluation split (as published), or the last.
        evaluate_every: epochs between looks at the evaluation split.
        precision: float32 or bf16, of the frozen network.
        seeds: one classifier each.
    """

    size: int = 512
    epochs: int = 60
    batch_size: int = 16
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_epoch: int = 25
    augment: bool = True
    select: str = "best"
    evaluate_every: int = 1
    precision: str = "float32"
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.select not in ("best", "last"):
            raise InputError(f"--select is {self.select!r}; it can be best or last")
        if min(self.size, self.epochs, self.batch_size, self.evaluate_every) < 1:
            raise InputError("--size, --epochs, --batch-size, --evaluate-every must be at least 1")
        if self.lr <= 0 or self.decay_epoch < 0 or not self.seeds:
            raise InputError("--lr must be above 0, --decay-epoch not negative, --seeds at least 1")
        require_precision(self.precision)


def evaluate_linear(
    encoder: Encoder,
    train_samples: LabelledSet,
    test_samples: LabelledSet,
    config: LinearConfig,
    ranks: Ranks,
    network: str = "trained",
    threads: int = 2,
) -> Result:
    """mIoU of a linear classifier, learned on one set of shards and scored on another.

    The sums that it learns from are those over all ranks, so the ranks change it by rounding only.
    """
    start = time.monotonic()
    require_comparable(train_samples, test_samples)
    encoder.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_images = WholeImages(train_samples, config.size, threads)
    test_images = WholeImages(test_samples, config.size, threads)
    train = _FeatureSet(encoder, train_images, config, ranks, own_count(test_images, ranks))
    test = _TestSet(encoder, test_images, config, ranks)
    scored = [_probe(train, test, config, ranks, seed) for seed in config.seeds]
    matrix, first = scored[0]
    return Result(
        "linear",
        network,
        encoder.step,
        tuple(one.miou for _, one in scored),
        first.iou,
        matrix,
        foreground_iou(matrix),
        first.pixel_accuracy,
        test_samples.classes,
        len(test_samples),
        time.monotonic() - start,
        asdict(config),
    )


def require_comparable(train: LabelledSet, test: LabelledSet) -> None:
    """Raises InputError unless both have the same classes."""
    if train.classes != test.classes:
        raise InputError(f"{train} and {test} have different classes; take both from one data set")


class _FeatureSet:
    """Decoder features and labels of the training images; cached where nothing is augmented."""

    def __init__(
        self, encoder: Encoder, images: WholeImages, config: LinearConfig, ranks: Ranks, beside: int
    ) -> None:
        """Fills the cache; `beside` images of the other split will have to fit in memory too."""
        self.encoder, self.images, self.config, self.ranks = encoder, images, config, ranks
        self.classes = len(images.classes)
        self.cache: dict[int, _Example] = {}
        if config.augment:
            return
        for batch, pixels in own_batches(images, config.batch_size, ranks, "train features"):
            features = cached_features(encoder, pixels, config, ranks)
            if not self.cache:
                _require_memory(features, own_count(images, ranks) + beside, config)
            for image, one in zip(batch, features, strict=True):
                label = torch.tensor(image.label)
                self.cache[image.sample_id] = (one, resize_nearest(label, (config.size,) * 2))

    def epoch(self, seed: int, epoch: int) -> Iterator[list[_Example]]:
        """What this rank contributes to each batch of an epoch; maybe nothing to some."""
        size = self.config.batch_size
        order = generator(seed, _ORDER, epoch).permutation(len(self.images))
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        if not self.config.augment:
            for batch in batches:
                yield [self.cache[i] for i in batch.tolist() if i in self.cache]
            return
        with ThreadPoolExecutor(self.images.threads) as pool:

            def draw(batch: NDArray[np.int64]) -> list[Future[_Example]]:
                own = batch[self.ranks.rank :: self.ranks.world_size].tolist()
                return [pool.submit(self._augmented, i, seed, epoch) for i in own]

            ahead = draw(batches[0])  # the next batch is drawn while this one is learned
            for following in [*batches[1:], order[:0]]:
                current, ahead = ahead, draw(following)
                yield self._embedded([future.result() for future in current])

    def _augmented(self, sample_id: int, seed: int, epoch: int) -> _Example:
        return augmented(self.images.read(sample_id), self.config.size, seed, epoch)

    def _embedded(self, drawn: list[_Example]) -> list[_Example]:
        if not drawn:
            return []
        pixels = normalise(torch.stack([pixels for pixels, _ in drawn]).to(self.ranks.device))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        features = frozen_features(self.encoder, pixels, self.config, self.ranks)
        return [(one, label) for one, (_, label) in zip(features, drawn, strict=True)]


class _TestSet:
    """The evaluation split's features; scored at the labels' own resolution."""

    def __init__(
        self, encoder: Encoder, images: WholeImages, config: LinearConfig, ranks: Ranks
    ) -> None:
        self.images, self.config, self.ranks = images, config, ranks
        self.cache: list[tuple[Tensor, Label]] = []
        for batch, pixels in own_batches(images, config.batch_size, ranks, "test features"):
            features = cached_features(encoder, pixels, config, ranks)
            if not self.cache:
                _require_memory(features, own_count(images, ranks), config)
            self.cache += [(one, image.label) for one, image in zip(features, batch, strict=True)]
        labelled = sum(int((label >= 0).sum()) for _, label in self.cache)
        on_device = torch.tensor([labelled], device=ranks.device)
        require_pixels(all_reduce_sum(on_device, ranks).cpu().numpy(), images.samples)

    @torch.inference_mode()
    def confusion(self, classifier: nn.Conv2d) -> Counts:
        """int64 [C, C] over all ranks; a collective."""
        classes = classifier.out_channels
        matrix = np.zeros((classes, classes), np.int64)
        for features, label in self.cache:
            on_device = features[None].to(self.ranks.device).float()
            logits = upsample(classifier(on_device), (self.config.size,) * 2)
            height, width = label.shape
            prediction = upsample(logits, (height, width)).argmax(1)[0].cpu().numpy()
            matrix += confusion(label, prediction, classes, classes)
        total: Counts = (
            all_reduce_sum(torch.from_numpy(matrix).to(self.ranks.device), self.ranks).cpu().numpy()
        )
        return total


def own_count(images: WholeImages, ranks: Ranks) -> int:
    return len(own_samples(len(images), ranks))


def _require_memory(features: Tensor, images: int, config: LinearConfig) -> None:
    """Raises InputError where features like these [b, C, h, w], of so many images, do not fit."""
    each = features[0].nbytes + 2 * config.size**2  # and a label of about that size
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    require_memory(
        images * each,
        available_memory() // local_ranks,
        f"the features of {images} images at {config.size} pixels",
        "make --size smaller, use ranks on more nodes, or fewer images"
        + ("" if config.augment else ", or leave --no-augment out: it keeps the training images'"),
    )


@torch.inference_mode()
def frozen_features(encoder: Encoder, pixels: Tensor, config: LinearConfig, ranks: Ranks) -> Tensor:
    """Decoder features [B, C, h, w] without gradient."""
    with precision(config.precision, ranks.device):
        return encoder.network.features(pixels)


def cached_features(encoder: Encoder, pixels: Tensor, config: LinearConfig, ranks: Ranks) -> Tensor:
    """Decoder features [B, C, h, w] as they are kept: bf16, in the memory of the host."""
    return frozen_features(encoder, pixels, config, ranks).to(torch.bfloat16).cpu()


def _probe(
    train: _FeatureSet, test: _TestSet, config: LinearConfig, ranks: Ranks, seed: int
) -> tuple[Counts, Score]:
    """Learns one classifier; returns confusion matrix and score of the epoch that counts."""
    classifier = _new_classifier(train, seed).to(ranks.device)
    optimizer = torch.optim.SGD(
        classifier.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    best: tuple[Counts, Score] | None = None
    epochs = range(config.epochs)
    for epoch in shown(epochs, f"linear, seed {seed}", config.epochs, ranks):
        optimizer.param_groups[0]["lr"] = config.lr * (0.1 if epoch >= config.decay_epoch else 1)
        for part in train.epoch(seed, epoch):
            _learn(classifier, optimizer, part, config.size, ranks)
        last = epoch + 1 == config.epochs
        if last or (config.select == "best" and (epoch + 1) % config.evaluate_every == 0):
            matrix = test.confusion(classifier)
            scored = score(matrix)
            if best is None or config.select == "last" or scored.miou > best[1].miou:
                best = matrix, scored
    assert best is not None
    return best


def _learn(
    classifier: nn.Conv2d,
    optimizer: torch.optim.Optimizer,
    part: list[_Example],
    size: int,
    ranks: Ranks,
) -> None:
    """One step on the mean over all labelled pixels of all ranks' parts; a collective."""
    optimizer.zero_grad(set_to_none=False)
    pixels = torch.zeros((), device=ranks.device)
    if part:
        features = torch.stack([one for one, _ in part]).to(ranks.device).float()
        labels = torch.stack([label for _, label in part]).to(ranks.device).long()
        logits = upsample(classifier(features), (size, size))
        F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").backward()  # type: ignore[no-untyped-call]
        pixels += (labels >= 0).sum()
    gradients = [
        parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for parameter in classifier.parameters()
    ]
    flat = torch.cat([pixels[None], *(gradient.flatten() for gradient in gradients)])
    all_reduce_sum(flat, ranks)
    sizes = [gradient.numel() for gradient in gradients]
    for parameter, total in zip(classifier.parameters(), torch.split(flat[1:], sizes), strict=True):
        parameter.grad = (total / flat[0].clamp_min(1)).view_as(parameter)
    optimizer.step()


def _new_classifier(train: _FeatureSet, seed: int) -> nn.Conv2d:
    """Weights normal(0, .01), bias 0, the same on every rank."""
    width = train.encoder.network.config.decoder_channels
    classifier = nn.Conv2d(width, train.classes, 1)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        classifier.weight.normal_(0, 0.01, generator=draw)
        assert classifier.bias is not None
        classifier.bias.zero_()
    return classifier


def augmented(image: WholeImage, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Flip, ±5° and scale .75–1.25: pixels uint8 [3, S, S] and label int16 [S, S]."""
    draw = generator(seed, _AUGMENT, epoch, image.sample_id)
    flip, angle, scale = draw.random() < 0.5, draw.uniform(-5, 5), draw.uniform(0.75, 1.25)
    label = resize_nearest(torch.tensor(image.label), (size, size))[None]
    pixels = image.pixels
    if flip:
        pixels, label = pixels.flip(-1), label.flip(-1)
    moved = {"angle": angle, "translate": [0, 0], "scale": scale}
    pixels = transforms.affine(
        pixels, **moved, shear=[0.0, 0.0], interpolation=InterpolationMode.BILINEAR
    )
    label = transforms.affine(
        label, **moved, shear=[0.0, 0.0], interpolation=InterpolationMode.NEAREST, fill=[IGNORED]
    )
    return pixels, label[0]
