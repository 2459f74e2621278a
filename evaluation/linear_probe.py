"""Linear classifier evaluation (MaskContrast, section 4.2): a 1×1 on frozen decoder features."""

import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.labelled import LabelledSet
from data_pipeline.order import generator
from data_pipeline.pieces import single_threaded_pool
from data_pipeline.resize import Resize, require_resize, resize_nearest
from data_pipeline.sample import Label, UInt8
from data_pipeline.whole_images import WholeImage, WholeImages, normalise
from evaluation.augmentation import augmented
from evaluation.crf import CrfConfig
from evaluation.feature_cache import FeatureCache
from evaluation.features import (
    forward,
    own_batches,
    own_samples,
    require_pixels,
    require_precision,
    shown,
)
from evaluation.linear_classifier import LinearClassifier, image_gradients
from evaluation.miou import Counts, Mean, require_mean, score
from evaluation.pixel_scores import (
    ClassMap,
    Pass,
    count_predictions,
    count_streamed,
    result_of,
)
from evaluation.resolution import Resolution
from evaluation.result import Result
from trainer.distributed import Ranks, all_gather_rows, all_reduce_sum
from trainer.encoder import Encoder

_ORDER = 11  # stream of the generator
_Example = tuple[Tensor, Tensor]  # features [C, h, w] or pixels [3, S, S], label int16 [S, S]
_Scored = tuple[UInt8 | None, Label, Tensor]  # image, label, logits


@dataclass(frozen=True)
class LinearConfig:
    """The protocol; the defaults are the published ones.

    Attributes:
        size: side that images are resized to, pixels.
        epochs, batch_size, lr, momentum, weight_decay: of SGD.
        decay_epoch: the last at the full rate, counted from 0; after it the rate is a tenth.
        augment: flip, rotation of ±5°, scale .75–1.25. Without, features are computed only once.
        select: best epoch on the evaluation split (as published: at the size of the images), or
            the last.
        evaluate_every: epochs between looks at the evaluation split.
        precision: float32 or bf16, of the frozen network.
        seeds: one classifier each.
        crf: score the classifiers with a CRF as well.
        resize: how images become squares (`resize_image`).
        mean: classes of the mIoU (`miou.score`).
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
    crf: CrfConfig | None = None
    resize: Resize = "opencv"
    mean: Mean = "present"

    def __post_init__(self) -> None:
        if self.select not in ("best", "last"):
            raise InputError(f"--select is {self.select!r}; it can be best or last")
        if min(self.size, self.epochs, self.batch_size, self.evaluate_every) < 1:
            raise InputError("--size, --epochs, --batch-size, --evaluate-every must be at least 1")
        if self.lr <= 0 or self.decay_epoch < 0 or not self.seeds:
            raise InputError("--lr must be above 0, --decay-epoch not negative, --seeds at least 1")
        require_precision(self.precision)
        require_resize(self.resize)
        require_mean(self.mean)


def evaluate_linear(
    encoder: Encoder,
    train_samples: LabelledSet,
    test_samples: LabelledSet,
    config: LinearConfig,
    ranks: Ranks,
    network: str = "trained",
    threads: int = 2,
    cache: Path | None = None,
) -> tuple[list[Result], LinearClassifier]:
    """mIoU of linear classifiers, learned on one set of images and scored on another.

    A collective. From equal features the ranks learn, on CPUs, the same bits for any number of
    them (and as many threads each): gradients are added image by image, in the order of the batch.

    Args:
        encoder: whose decoder features are classified; they stay as they are.
        train_samples, test_samples: with the same classes.
        config: the protocol.
        ranks: that share the work.
        network: its name in the result.
        threads: that read images, and that refine with the CRF.
        cache: folder for the features that are kept, 2 bytes a value: of the images that are
            scored and, without augmentation, of those that are learned on. Default: where the
            system has its temporary files.

    Returns:
        Results of protocol linear and, with a CRF, linear-crf; and the first seed's classifier, of
        the epoch that counts.

    Raises:
        InputError: different classes, nothing labelled, an image that cannot be read, or no space
            for the features.
    """
    start = time.monotonic()
    require_comparable(train_samples, test_samples)
    encoder.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_images = WholeImages(train_samples, config.size, threads, config.resize)
    test_images = WholeImages(test_samples, config.size, threads, config.resize)
    kept = own_count(test_images, ranks) + (0 if config.augment else own_count(train_images, ranks))
    advice = "" if config.augment else ", or leave --no-augment out: it keeps the training images'"
    with FeatureCache(cache, kept, config.size, advice) as features:
        test = _TestSet(encoder, test_images, features, config, ranks)
        train = _FeatureSet(encoder, train_images, features, config, ranks)
        with single_threaded_pool(torch.get_num_threads()) as pool:
            probes = [_probe(train, test, config, ranks, seed, pool) for seed in config.seeds]
        seconds = time.monotonic() - start
        refined = [] if config.crf is None else [test.refined(one, config.crf) for _, one in probes]
    options = asdict(config)
    crf = options.pop("crf")
    about = (network, encoder.step)
    results = [
        result_of(
            "linear",
            *about,
            [one for one, _ in probes],
            test_samples,
            seconds,
            options,
            config.mean,
        )
    ]
    if refined:
        seconds = time.monotonic() - start
        options = {**options, "crf": crf}
        results += [
            result_of("linear-crf", *about, refined, test_samples, seconds, options, config.mean)
        ]
    return results, probes[0][1]


def score_own_classifier(
    encoder: Encoder,
    samples: LabelledSet,
    config: LinearConfig,
    ranks: Ranks,
    network: str = "trained",
    threads: int = 2,
) -> tuple[list[Result], LinearClassifier]:
    """The same, of the classifier that came in the network's file: nothing is learned.

    Of the protocol only size, batch size, precision and CRF count.

    Raises:
        InputError: the file holds none, or one of another number of classes.
    """
    start = time.monotonic()
    classifier = LinearClassifier.of(encoder)
    own, classes = len(classifier.bias), len(samples.classes)
    if own != classes:
        raise InputError(
            f"the classifier of {encoder.origin} has {own} classes, and {samples} has {classes}; "
            "take the data set that it was learned on"
        )
    encoder.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    how = Pass(config.batch_size, config.precision, config.crf, "own classifier")
    images = WholeImages(samples, config.size, threads, config.resize)
    matrices = count_streamed(
        encoder.network.features, classifier, images, ClassMap(classes), how, ranks
    )
    options: dict[str, Any] = {
        "own_classifier": True, "size": config.size, "precision": config.precision,
        "resize": config.resize, "mean": config.mean,
    }  # fmt: skip
    results = []
    for protocol, matrix in zip(("linear", "linear-crf"), matrices, strict=False):
        if protocol == "linear-crf" and config.crf is not None:
            options = {**options, "crf": asdict(config.crf)}
        seconds = time.monotonic() - start
        results.append(
            result_of(
                protocol, network, encoder.step, [matrix], samples, seconds, options, config.mean
            )
        )
    return results, classifier.copy()


def require_comparable(train: LabelledSet, test: LabelledSet) -> None:
    """Raises InputError unless both have the same classes."""
    if train.classes != test.classes:
        raise InputError(f"{train} and {test} have different classes; take both from one data set")


@dataclass(frozen=True)
class _Part:
    """This rank's part of a batch.

    Attributes:
        examples: that it holds, in the order of the batch; maybe none.
        owners: int64 [b], the rank that holds each image of the batch.
    """

    examples: list[_Example]
    owners: NDArray[np.int64]


class _FeatureSet:
    """Decoder features and labels of the training images; kept where nothing is augmented."""

    def __init__(
        self,
        encoder: Encoder,
        images: WholeImages,
        cache: FeatureCache,
        config: LinearConfig,
        ranks: Ranks,
    ) -> None:
        self.encoder, self.images, self.config, self.ranks = encoder, images, config, ranks
        self.classes = len(images.classes)
        self.cache = cache
        self.place: dict[int, int] = {}  # in the cache, by sample
        if config.augment:
            return
        size = (config.size,) * 2
        for batch, pixels in own_batches(images, config.batch_size, ranks, "train features"):
            numbers = (image.sample_id for image in batch)
            self.place |= {number: len(cache) + i for i, number in enumerate(numbers)}
            labels = [resize_nearest(torch.tensor(one.label), size).numpy() for one in batch]
            cache.add(frozen_features(encoder, pixels, config, ranks), labels)

    def epoch(self, seed: int, epoch: int) -> Iterator[_Part]:
        """What this rank contributes to each batch of an epoch.

        As published, images that do not fill a batch wait for the next epoch's order.
        """
        size, ranks = self.config.batch_size, self.ranks
        order = generator(seed, _ORDER, epoch).permutation(len(self.images))
        whole = len(order) // size * size or len(order)
        batches = [order[first : first + size] for first in range(0, whole, size)]
        if not self.config.augment:
            for batch in batches:
                own = [self._kept_example(i) for i in batch.tolist() if i in self.place]
                yield _Part(own, batch % ranks.world_size)
            return
        with single_threaded_pool(self.images.threads) as pool:

            def draw(batch: NDArray[np.int64]) -> list[Future[_Example]]:
                own = batch[ranks.rank :: ranks.world_size].tolist()
                return [pool.submit(self._augmented, i, seed, epoch) for i in own]

            ahead = draw(batches[0])  # the next batch is drawn while this one is learned
            for batch, following in zip(batches, [*batches[1:], order[:0]], strict=True):
                current, ahead = ahead, draw(following)
                own = self._embedded([future.result() for future in current])
                yield _Part(own, np.arange(len(batch)) % ranks.world_size)

    def _kept_example(self, sample_id: int) -> _Example:
        features, label = self.cache.read(self.place[sample_id])
        return features, torch.from_numpy(label)

    def _augmented(self, sample_id: int, seed: int, epoch: int) -> _Example:
        return augmented(
            *(self.images.read(sample_id), self.config.size, seed, epoch, self.config.resize)
        )

    def _embedded(self, drawn: list[_Example]) -> list[_Example]:
        if not drawn:
            return []
        pixels = normalise(torch.stack([pixels for pixels, _ in drawn]).to(self.ranks.device))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        features = frozen_features(self.encoder, pixels, self.config, self.ranks)
        return [(one, label) for one, (_, label) in zip(features, drawn, strict=True)]


class _TestSet:
    """The evaluation split's features."""

    def __init__(
        self,
        encoder: Encoder,
        images: WholeImages,
        cache: FeatureCache,
        config: LinearConfig,
        ranks: Ranks,
    ) -> None:
        self.images, self.cache, self.config, self.ranks = images, cache, config, ranks
        self.numbers = own_samples(len(images), ranks)
        self.first = len(cache)  # what follows is of these images, in the order of the numbers
        self.classes = ClassMap(len(images.classes))
        labelled = 0
        for batch, pixels in own_batches(images, config.batch_size, ranks, "test features"):
            labels = [image.label for image in batch]
            cache.add(frozen_features(encoder, pixels, config, ranks), labels)
            labelled += sum(int((label >= 0).sum()) for label in labels)
        on_device = torch.tensor([labelled], device=ranks.device)
        require_pixels(all_reduce_sum(on_device, ranks).cpu().numpy(), images.samples)

    def confusion(self, classifier: LinearClassifier, resolution: Resolution = "label") -> Counts:
        """int64 [C, C] over all ranks, at the labels' own size or the images'; a collective."""
        predicted = (self._predicted(classifier, i) for i in range(len(self.numbers)))
        [matrix] = count_predictions(predicted, self.classes, self.ranks, resolution=resolution)
        return matrix

    def refined(self, classifier: LinearClassifier, crf: CrfConfig) -> Counts:
        """The same after a CRF, whose pictures are read again."""

        def predicted() -> Iterator[_Scored]:
            classified = classifier.to(self.ranks.device)
            batches = self.images.batches(self.numbers, self.images.threads)
            for place, image in enumerate(image for batch in batches for image in batch):
                yield self._predicted(classified, place, image)

        bar = shown(predicted(), "linear, CRF", len(self.numbers), self.ranks)
        threads = self.images.threads
        return count_predictions(bar, self.classes, self.ranks, crf, threads)[1]

    @torch.inference_mode()
    def _predicted(
        self, classifier: LinearClassifier, place: int, image: WholeImage | None = None
    ) -> _Scored:
        features, label = self.cache.read(self.first + place)
        on_device = features.to(self.ranks.device)
        logits = classifier.logits_at(on_device, self.config.size)
        return None if image is None else image.image, label, logits


def own_count(images: WholeImages, ranks: Ranks) -> int:
    return len(own_samples(len(images), ranks))


@torch.inference_mode()
def frozen_features(encoder: Encoder, pixels: Tensor, config: LinearConfig, ranks: Ranks) -> Tensor:
    """Decoder features [B, C, h, w] without gradient."""
    return forward(encoder.network.features, pixels, config.precision)


def _probe(
    train: _FeatureSet,
    test: _TestSet,
    config: LinearConfig,
    ranks: Ranks,
    seed: int,
    pool: Executor,
) -> tuple[Counts, LinearClassifier]:
    """Learns one classifier; returns it as it was at the epoch that counts, and its confusion."""
    width = train.encoder.network.config.decoder_channels
    weights = LinearClassifier.drawn(train.classes, width, seed).to(ranks.device).learnable()
    classifier = LinearClassifier(*weights)
    optimizer = torch.optim.SGD(
        weights, config.lr, config.momentum, weight_decay=config.weight_decay
    )
    best: tuple[float, LinearClassifier] | None = None
    epochs = range(config.epochs)
    for epoch in shown(epochs, f"linear, seed {seed}", config.epochs, ranks):
        optimizer.param_groups[0]["lr"] = config.lr * (0.1 if epoch > config.decay_epoch else 1)
        for part in train.epoch(seed, epoch):
            _learn(classifier, optimizer, part, ranks, pool)
        last = epoch + 1 == config.epochs
        if config.select == "best" and (last or (epoch + 1) % config.evaluate_every == 0):
            miou = score(test.confusion(classifier, "image"), config.mean).miou
            if best is None or miou > best[0]:
                best = miou, classifier.copy()
    counted = classifier.copy() if best is None else best[1]
    return test.confusion(counted.to(ranks.device)), counted


def _learn(
    classifier: LinearClassifier,
    optimizer: torch.optim.Optimizer,
    part: _Part,
    ranks: Ranks,
    pool: Executor,
) -> None:
    """One step on the mean over all labelled pixels of a batch; a collective."""
    values = classifier.weight.numel() + classifier.bias.numel() + 1
    own = torch.zeros((0, values), device=ranks.device)
    if part.examples:
        features = torch.stack([one for one, _ in part.examples]).to(ranks.device)
        labels = torch.stack([label for _, label in part.examples]).to(ranks.device).long()
        own = image_gradients(classifier, features, labels, pool)
    counts = np.bincount(part.owners, minlength=ranks.world_size).tolist()
    rows = all_gather_rows(own, counts, ranks)
    # rank by rank, back into the order of the batch, so that the sum is that of one rank
    places = np.argsort(np.argsort(part.owners, kind="stable"))
    total = rows[torch.from_numpy(places).to(ranks.device)].sum(0)
    mean = total[:-1] / total[-1].clamp_min(1)
    sizes = [classifier.weight.numel(), classifier.bias.numel()]
    by_weight, by_bias = torch.split(mean, sizes)
    classifier.weight.grad = by_weight.view_as(classifier.weight)
    classifier.bias.grad = by_bias
    optimizer.step()
