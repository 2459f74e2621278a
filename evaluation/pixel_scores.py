"""Scores of pixel-wise predictions at the labels' resolution, with and without CRF.

As published, a pixel takes its largest logit at the size of the images, and the map of classes is
then resized to the label's, each pixel the nearest one. The CRF refines at the label's size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.labelled import LabelledSet
from data_pipeline.sample import Label, UInt8
from data_pipeline.whole_images import WholeImages, normalise
from evaluation.crf import CrfConfig, refine
from evaluation.features import forward, own_samples, require_pixels, shown
from evaluation.linear_classifier import LinearClassifier
from evaluation.miou import Counts, Mean, confusion, foreground_iou, score
from evaluation.resolution import Resolution, at_resolution
from evaluation.result import Result
from trainer.distributed import Ranks, all_reduce_sum
from trainer.model import upsample

Features = Callable[[Tensor], Tensor]  # normalised pixels [b, 3, S, S] to [b, F, h, w]


@dataclass(frozen=True)
class ClassMap:
    """Which class of the data set the labels and the predictions become.

    Attributes:
        classes: of the data set.
        of_label: int16 [classes], -1 for labels that are ignored; None keeps all.
        of_prediction: int64 [C of the classifier], `classes` for no class; None keeps all.
    """

    classes: int
    of_label: NDArray[np.int16] | None = None
    of_prediction: NDArray[np.int64] | None = None

    @property
    def columns(self) -> int:
        return self.classes if self.of_prediction is None else self.classes + 1

    def count(self, label: Label, prediction: NDArray[np.integer[Any]]) -> Counts:
        """int64 [classes, columns] of one image."""
        if self.of_label is not None:
            label = np.where(label >= 0, self.of_label[np.maximum(label, 0)], label)
        if self.of_prediction is not None:
            prediction = self.of_prediction[prediction]
        return confusion(label, prediction, self.classes, self.columns)


@dataclass
class _Tally:
    """Confusion without and with CRF."""

    plain: Counts
    refined: Counts
    waiting: deque[Future[Counts]] = field(default_factory=deque)


def count_predictions(
    images: Iterable[tuple[UInt8 | None, Label, Tensor]],
    classes: ClassMap,
    ranks: Ranks,
    crf: CrfConfig | None = None,
    threads: int = 1,
    resolution: Resolution = "label",
) -> list[Counts]:
    """Confusion over all ranks, and with a CRF a second one; a collective.

    Args:
        images: this rank's: image uint8 [H, W, 3] (None will do without CRF), label [H, W], and
            logits [C, S, S].
        classes: what labels and predictions become.
        crf: applied to the softmax of the logits at the label's size, in `threads` threads; NumPy
            lets go of the interpreter's lock.
        threads: see `crf`.
        resolution: at which pixels are counted: the label's own, or the square's; without CRF.
    """
    empty = np.zeros((classes.classes, classes.columns), np.int64)
    tally = _Tally(empty, empty.copy())
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for image, label, logits in images:
            tally.plain += classes.count(*at_resolution(label, logits.argmax(0).cpu(), resolution))
            if crf is not None:
                assert image is not None
                size = (label.shape[0], label.shape[1])
                probabilities = upsample(logits[None], size)[0].softmax(0).cpu().numpy()
                job = pool.submit(_count_refined, image, label, probabilities, classes, crf)
                tally.waiting.append(job)
            if len(tally.waiting) > threads:
                tally.refined += tally.waiting.popleft().result()
        for done in tally.waiting:
            tally.refined += done.result()
    matrices = [tally.plain] if crf is None else [tally.plain, tally.refined]
    stacked = torch.from_numpy(np.stack(matrices)).to(ranks.device)
    return list(all_reduce_sum(stacked, ranks).cpu().numpy())


def _count_refined(
    image: UInt8,
    label: Label,
    probabilities: NDArray[np.float32],
    classes: ClassMap,
    crf: CrfConfig,
) -> Counts:
    return classes.count(label, refine(image, probabilities, crf).argmax(0))


@dataclass(frozen=True)
class Pass:
    """How a classifier goes over images once.

    Attributes:
        batch_size: images a forward pass.
        precision: float32 or bf16, of the network.
        crf: also count with it.
        title: of the progress bar.
    """

    batch_size: int
    precision: str
    crf: CrfConfig | None
    title: str


def count_streamed(
    features: Features,
    classifier: LinearClassifier,
    images: WholeImages,
    classes: ClassMap,
    how: Pass,
    ranks: Ranks,
) -> list[Counts]:
    """`count_predictions` of a classifier on a network's features, which are not kept.

    Raises:
        InputError: every label pixel is ignored.
    """
    classifier = classifier.to(ranks.device)
    numbers = own_samples(len(images), ranks)

    def predicted() -> Iterator[tuple[UInt8, Label, Tensor]]:
        for batch in images.batches(numbers, how.batch_size):
            stacked = torch.stack([image.pixels for image in batch]).to(ranks.device)
            pixels = normalise(stacked).contiguous(memory_format=torch.channels_last)
            found = forward(features, pixels, how.precision)
            for one, image in zip(found, batch, strict=True):
                with torch.inference_mode():
                    logits = classifier.logits_at(one, images.size)
                yield image.image, image.label, logits

    bar = shown(predicted(), how.title, len(numbers), ranks)
    matrices = count_predictions(bar, classes, ranks, how.crf, images.threads)
    require_pixels(matrices[0], images.samples)
    return matrices


def result_of(
    protocol: str,
    network: str,
    step: int,
    matrices: list[Counts],
    samples: LabelledSet,
    seconds: float,
    options: dict[str, Any],
    mean: Mean = "present",
) -> Result:
    """A result with one confusion matrix a seed."""
    scores = [score(matrix, mean) for matrix in matrices]
    return Result(
        protocol=protocol,
        network=network,
        step=step,
        values=tuple(one.miou for one in scores),
        iou=scores[0].iou,
        confusion=matrices[0],
        foreground_iou=foreground_iou(matrices[0]),
        pixel_accuracy=scores[0].pixel_accuracy,
        classes=samples.classes,
        images=len(samples),
        seconds=seconds,
        options=options,
        metrics={"pixel accuracy": tuple(one.pixel_accuracy for one in scores)},
    )
