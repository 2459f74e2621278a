"""A classifier that was learned on one data set, scored on another; ours.

Shows how far features and classifier generalise. Classes are matched by their names.
"""

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from data_pipeline.errors import InputError
from data_pipeline.labelled import LabelledSet
from data_pipeline.resize import Resize, require_resize
from data_pipeline.whole_images import WholeImages
from evaluation.class_names import map_classes, shared_classes
from evaluation.crf import CrfConfig
from evaluation.features import require_precision
from evaluation.linear_classifier import LinearClassifier
from evaluation.pixel_scores import Pass, count_streamed, result_of
from evaluation.result import Result
from evaluation.saved_head import SavedHead
from trainer.distributed import Ranks
from trainer.encoder import Encoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransferConfig:
    """How a classifier is scored on a foreign data set.

    Attributes:
        size: side that images are resized to, pixels; None takes that of the classifier.
        unknown: pixels of classes that the classifier does not know are ignored, or background.
        batch_size: images a forward pass.
        precision: float32 or bf16, of the network.
        crf: score with a CRF as well.
        resize: how images become squares (`resize_image`); None takes that of the classifier.
    """

    size: int | None = None
    unknown: str = "ignore"
    batch_size: int = 16
    precision: str = "float32"
    crf: CrfConfig | None = None
    resize: Resize | None = None

    def __post_init__(self) -> None:
        if self.unknown not in ("ignore", "background"):
            raise InputError(f"--unknown is {self.unknown!r}; it can be ignore or background")
        if self.batch_size < 1 or (self.size is not None and self.size < 1):
            raise InputError("--size and --batch-size must be at least 1")
        require_precision(self.precision)
        if self.resize is not None:
            require_resize(self.resize)


def require_transferable(encoder: Encoder, head: SavedHead, samples: LabelledSet) -> None:
    """Raises InputError unless the classifier fits the network and shares a class with the set."""
    if head.kind != "linear":
        raise InputError(
            f"the head is of kind {head.kind}, and only linear ones can be transferred; give "
            "linear-NETWORK.safetensors, which `maskbank evaluate linear` writes"
        )
    width, features = head.tensors["weight"].shape[1], encoder.network.config.decoder_channels
    if width != features:
        raise InputError(
            f"the classifier takes {width} features, and {encoder.origin} has {features}; give the "
            "network that it was learned on"
        )
    map_classes(head.classes, samples.classes, "ignore")


def evaluate_transfer(
    encoder: Encoder,
    head: SavedHead,
    samples: LabelledSet,
    config: TransferConfig,
    ranks: Ranks,
    network: str = "trained",
    threads: int = 2,
) -> list[Result]:
    """mIoU of a classifier on a data set that it was not learned on; a collective.

    Over the classes of the data set that have pixels left (`class_names.map_classes` says what
    becomes of those that only one side has). The network's step is compared with that of the
    classifier, and a difference is warned of.

    Returns:
        Results of protocol transfer and, with a CRF, transfer-crf.

    Raises:
        InputError: classifier and network do not fit, no class is shared, or nothing is labelled.
    """
    start = time.monotonic()
    require_transferable(encoder, head, samples)
    if head.step != encoder.step and ranks.is_main:
        _log.warning(
            "the classifier was learned at step %d of a network, and this one is at step %d; its "
            "features may mean something else",
            *(head.step, encoder.step),
        )
    classes = map_classes(head.classes, samples.classes, config.unknown)
    classifier = LinearClassifier(head.tensors["weight"].float(), head.tensors["bias"].float())
    encoder.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = WholeImages(samples, config.size or head.size, threads, config.resize or head.resize)
    how = Pass(config.batch_size, config.precision, config.crf, "transfer")
    matrices = count_streamed(encoder.network.features, classifier, images, classes, how, ranks)
    options: dict[str, Any] = {
        "size": images.size,
        "resize": images.resize,
        "precision": config.precision,
        "unknown": config.unknown,
        "learned_on": head.data_set,
        "shared": list(shared_classes(head.classes, samples.classes)),
    }
    results = [
        result_of(
            *("transfer", network, encoder.step, matrices[:1], samples),
            *(time.monotonic() - start, options),
        )
    ]
    if config.crf is not None:
        options = {**options, "crf": asdict(config.crf)}
        results.append(
            result_of(
                *("transfer-crf", network, encoder.step, matrices[1:], samples),
                *(time.monotonic() - start, options),
            )
        )
    return results
