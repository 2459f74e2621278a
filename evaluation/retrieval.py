"""Semantic segment retrieval (MaskContrast, section 4.4): each mask takes its neighbour's class.

The bank has one vector for each image of `train`, labelled with the most frequent class inside its
predicted mask, background and ignored pixels apart. A val image's mask takes the class of the
vector with the largest cosine. Of seven classes the pixels of all others are ignored first, in the
bank and in the scoring: a mask of a horse and a smaller person is one of a person.
"""

import time
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import CannotScore, InputError
from data_pipeline.labelled import LabelledSet
from data_pipeline.resize import Resize, require_resize
from data_pipeline.whole_images import WholeImages
from evaluation.features import require_pixels, require_precision
from evaluation.miou import Counts, Mean, foreground_iou, mean_iou, require_mean, score
from evaluation.prototypes import GIVEN_MASKS, PrototypeConfig
from evaluation.resolution import Resolution, require_resolution
from evaluation.result import Result
from evaluation.statistics import ImageStatistics, collect_statistics
from trainer.distributed import Ranks
from trainer.encoder import Encoder

SEVEN = ("aeroplane", "bottle", "bus", "car", "cat", "cow", "person")
NEIGHBOURS = 5  # kept for the report
_ROWS = 1024  # queries whose similarities to the bank are held at a time


@dataclass(frozen=True)
class RetrievalConfig:
    """The protocol; the defaults are the published ones.

    Attributes:
        size: side that images are resized to, pixels.
        prototype: how an image's vector is taken.
        resolution: at which pixels are scored: image, the square of `size`, or label, the label's
            own.
        batch_size: images a forward pass.
        precision: float32 or bf16.
        resize: how images become squares (`resize_image`).
        mean: classes of the mIoU (`miou.score`).
    """

    size: int = 512
    prototype: PrototypeConfig = field(default_factory=PrototypeConfig)
    resolution: Resolution = "image"
    batch_size: int = 16
    precision: str = "float32"
    resize: Resize = "opencv"
    mean: Mean = "present"

    def __post_init__(self) -> None:
        if min(self.size, self.batch_size) < 1:
            raise InputError("--size and --batch-size must be at least 1")
        require_resolution(self.resolution)
        require_precision(self.precision)
        require_resize(self.resize)
        require_mean(self.mean)

    def require(self, encoder: Encoder) -> None:
        """Raises InputError where the network cannot do this: said before any work."""
        if self.prototype.foreground != "mask":
            encoder.require("saliency", "this", GIVEN_MASKS)


@dataclass(frozen=True)
class Neighbours:
    """The nearest bank images of some queries, for pictures.

    Attributes:
        queries: int64 [q], sample ids in the evaluated set.
        bank: int64 [q, k], sample ids in the bank's set, nearest first.
        similarity: float32 [q, k], cosines.
        query_class: int64 [q], the most frequent class inside the mask, 0 where no object is.
        bank_class: int64 [q, k], of the bank images.
    """

    queries: NDArray[np.int64]
    bank: NDArray[np.int64]
    similarity: NDArray[np.float32]
    query_class: NDArray[np.int64]
    bank_class: NDArray[np.int64]


def evaluate_retrieval(
    encoder: Encoder,
    bank_samples: LabelledSet,
    samples: LabelledSet,
    config: RetrievalConfig,
    ranks: Ranks,
    network: str = "trained",
    threads: int = 2,
) -> tuple[list[Result], Neighbours]:
    """Retrieval mIoU over all classes and, where the set has them, over the published seven.

    The same on every rank.
    """
    start = time.monotonic()
    config.require(encoder)
    if bank_samples.classes != samples.classes:
        raise InputError(
            f"{bank_samples} and {samples} have different classes; take both from one data set"
        )
    options = (config.prototype, ranks, config.batch_size, config.precision)
    bank_images = WholeImages(bank_samples, config.size, threads, config.resize)
    bank = collect_statistics(
        encoder, bank_images, *options, resolution=config.resolution, title="retrieval bank"
    )
    images = WholeImages(samples, config.size, threads, config.resize)
    queries = collect_statistics(
        encoder, images, *options, resolution=config.resolution, title="retrieval queries"
    )
    require_pixels(queries.binary(), samples)
    classes = samples.classes
    variants = {f"retrieval-{len(classes)}": np.arange(len(classes))}
    seven = [classes.index(name) for name in SEVEN if name in classes]
    if len(seven) == len(SEVEN):
        variants["retrieval-7"] = np.array([0, *seven])
    results = []
    neighbours = None
    for protocol, kept in variants.items():
        matrix, usable, nearest = _retrieve(bank, queries, kept)
        scored = score(matrix)
        # of the seven the mean leaves background out
        counted = scored.iou if len(kept) == len(classes) else scored.iou[1:]
        results.append(
            Result(
                protocol=protocol,
                network=network,
                step=encoder.step,
                values=(mean_iou(counted, config.mean),),
                iou=scored.iou,
                confusion=matrix,
                foreground_iou=foreground_iou(queries.binary()),
                pixel_accuracy=scored.pixel_accuracy,
                classes=tuple(classes[i] for i in kept),
                images=len(samples),
                seconds=time.monotonic() - start,
                options={**asdict(config), "bank_images": len(bank_samples), "bank_used": usable},
            )
        )
        neighbours = neighbours or nearest
    assert neighbours is not None
    return results, neighbours


def frequent_classes(statistics: ImageStatistics) -> NDArray[np.int64]:
    """The most frequent class inside each image's mask, background left out; 0 where none is."""
    inside = statistics.inside.copy()
    inside[:, 0] = 0
    found: NDArray[np.int64] = inside.argmax(1)
    return found


def _retrieve(
    bank: ImageStatistics,
    queries: ImageStatistics,
    kept: NDArray[np.int64],
) -> tuple[Counts, int, Neighbours]:
    """Confusion among the kept classes (background first), bank vectors used, and neighbours.

    Pixels of other classes are ignored, so that images with no other class are in no bank.
    """
    bank, queries = bank.of_classes(kept), queries.of_classes(kept)
    labels = frequent_classes(bank)
    usable = np.flatnonzero(bank.found & (labels > 0))
    if len(usable) == 0:
        raise CannotScore(
            "no image of the bank has a predicted mask over a labelled object: there is nothing to "
            "retrieve; check the labels, or take --foreground mask"
        )
    vectors, columns = bank.vectors[usable], labels[usable]
    count = min(NEIGHBOURS, len(usable))
    nearest = np.empty((len(queries.vectors), count), np.int64)
    similarity = np.empty((len(queries.vectors), count), np.float32)
    for first in range(0, len(nearest), _ROWS):
        # float64 rounds alike whatever the number of rows
        part = queries.vectors[first : first + _ROWS].astype(np.float64) @ vectors.T
        order = np.argsort(-part, axis=1, kind="stable")[:, :count]
        nearest[first : first + _ROWS] = order
        similarity[first : first + _ROWS] = np.take_along_axis(part, order, 1)
    assignment = np.where(queries.found, columns[nearest[:, 0]], 0)
    matrix = queries.confusion(assignment, len(kept))
    shown = np.flatnonzero(queries.found)
    return (
        matrix,
        len(usable),
        Neighbours(
            queries.sample_ids[shown],
            bank.sample_ids[usable][nearest[shown]],
            similarity[shown],
            kept[frequent_classes(queries)[shown]],
            kept[columns[nearest[shown]]],
        ),
    )
