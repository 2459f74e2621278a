"""Semi-supervised evaluation (MaskContrast, section 4.6): all of the network and a 1×1 learn.

On a share of the labelled images. The paper gives no recipe, so this one is ours.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.errors import CannotScore, InputError
from data_pipeline.labelled import LabelledSet
from data_pipeline.order import generator
from data_pipeline.resize import Resize, require_resize, resize_nearest
from data_pipeline.sample import IGNORED
from data_pipeline.whole_images import WholeImages, normalise
from evaluation.augmentation import augmented, recoloured
from evaluation.crf import CrfConfig
from evaluation.features import precision, require_precision, shown
from evaluation.label_splits import Numbers
from evaluation.linear_classifier import LinearClassifier
from evaluation.linear_probe import require_comparable
from evaluation.miou import Counts
from evaluation.pixel_scores import ClassMap, Pass, count_streamed, result_of
from evaluation.result import Result
from trainer.distributed import Ranks, all_reduce_sum
from trainer.encoder import Encoder
from trainer.model import PixelEncoder, upsample
from trainer.partial import PartialEncoder

_ORDER = 13  # stream of the generator
_Example = tuple[Tensor, Tensor]  # pixels uint8 [3, S, S], label int16 [S, S]


@dataclass(frozen=True)
class FinetuneConfig:
    """The recipe; ours.

    Attributes:
        size: side that images are resized to, pixels.
        epochs: over the share.
        min_steps: at least so many steps, whatever the epochs say: 1% is a handful of images.
        batch_size: images a step, over all ranks.
        at_once: images of a rank in one forward pass; gradients of several passes are added.
        lr: of SGD, for the network; falls to 0, poly with power .9 a step.
        head_factor: times which the classifier learns.
        momentum, weight_decay: of SGD.
        augment: flip, rotation of ±5°, scale .75–1.25, colours ±25%.
        precision: float32 or bf16, of the network.
        crf: score with a CRF as well.
        resize: how images become squares (`resize_image`).
    """

    size: int = 512
    epochs: int = 30
    min_steps: int = 2000
    batch_size: int = 16
    at_once: int = 8
    lr: float = 0.004
    head_factor: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: bool = True
    precision: str = "float32"
    crf: CrfConfig | None = None
    resize: Resize = "opencv"

    def __post_init__(self) -> None:
        if min(self.size, self.epochs, self.batch_size, self.at_once) < 1 or self.min_steps < 0:
            raise InputError(
                "--size, --epochs, --batch-size and --at-once must be at least 1, --min-steps not "
                "negative"
            )
        if self.lr <= 0 or self.head_factor <= 0:
            raise InputError("--lr must be above 0")
        require_precision(self.precision)
        require_resize(self.resize)

    def steps(self, images: int) -> int:
        """Steps on a share of so many images."""
        return max(self.min_steps, self.epochs * -(-images // self.batch_size))


def evaluate_finetune(
    encoder: Encoder,
    train_samples: LabelledSet,
    test_samples: LabelledSet,
    splits: dict[float, list[Numbers]],
    config: FinetuneConfig,
    ranks: Ranks,
    network: str = "trained",
    threads: int = 2,
) -> list[Result]:
    """mIoU after fine-tuning on each share, one value a split; a collective.

    Batch norm keeps its statistics and dropout is off, so that the ranks change the sums over a
    batch by rounding only; scale and shift of batch norm learn. Memory: a second network, its
    gradients and momentum.

    Args:
        encoder: stays as it is; with a decoder or without.
        train_samples, test_samples: with the same classes.
        splits: by share in percent, numbers of the images to learn on (`label_splits.py`); the
            position of a split is the seed of its classifier, order and augmentation.
        config: the recipe.
        ranks: that share each batch.
        network: its name in the results.
        threads: that read images, and that refine with the CRF.

    Returns:
        For each share a result of protocol finetune-SHARE and, with a CRF, finetune-crf-SHARE.

    Raises:
        InputError: different classes, nothing labelled, an image that cannot be read, or weights
            that grew beyond all numbers.
    """
    require_comparable(train_samples, test_samples)
    train = WholeImages(train_samples, config.size, threads, config.resize)
    test = WholeImages(test_samples, config.size, threads, config.resize)
    results: list[Result] = []
    for percent, numbers in splits.items():
        start = time.monotonic()
        matrices = [
            _finetuned(encoder, train, test, one, config, ranks, seed, f"{percent:g}%")
            for seed, one in enumerate(numbers)
        ]
        options: dict[str, Any] = asdict(config)
        crf = options.pop("crf")
        options |= {"learned_on": [len(one) for one in numbers]}
        options |= {"steps": [config.steps(len(one)) for one in numbers]}
        about = (network, encoder.step)
        for place, name in enumerate(("finetune", "finetune-crf")[: len(matrices[0])]):
            results.append(
                result_of(
                    *(f"{name}-{percent:g}", *about, [one[place] for one in matrices]),
                    *(test_samples, time.monotonic() - start),
                    options if place == 0 else {**options, "crf": crf},
                )
            )
    return results


def _finetuned(
    encoder: Encoder,
    train: WholeImages,
    test: WholeImages,
    numbers: Numbers,
    config: FinetuneConfig,
    ranks: Ranks,
    seed: int,
    title: str,
) -> list[Counts]:
    """Confusion without and with CRF after learning on these images."""
    title = f"{title}, split {seed + 1}"
    network = learnable_copy(encoder, ranks)
    classes, width = len(train.classes), network.config.decoder_channels
    weights = LinearClassifier.drawn(classes, width, seed).to(ranks.device).learnable()
    classifier = LinearClassifier(*weights)
    learn(network, classifier, train, numbers, config, ranks, seed, title)
    how = Pass(config.at_once, config.precision, config.crf, f"scoring {title}")
    return count_streamed(network.features, classifier.copy(), test, ClassMap(classes), how, ranks)


def learnable_copy(encoder: Encoder, ranks: Ranks) -> PixelEncoder | PartialEncoder:
    """A copy of the network in evaluation mode, whose backbone and decoder have gradients."""
    network = deepcopy(encoder.network).eval()
    network.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in (network.backbone, network.decoder):
        part.requires_grad_(True)
    return network


def learn(
    network: PixelEncoder | PartialEncoder,
    classifier: LinearClassifier,
    images: WholeImages,
    numbers: Numbers,
    config: FinetuneConfig,
    ranks: Ranks,
    seed: int,
    title: str,
) -> None:
    """SGD on network and classifier, in place; a collective.

    Raises:
        InputError: the weights grew beyond all numbers.
    """
    own = [one for one in network.parameters() if one.requires_grad]
    head = [one for one in (classifier.weight, classifier.bias) if isinstance(one, nn.Parameter)]
    optimizer = torch.optim.SGD(
        [{"params": own, "factor": 1.0}, {"params": head, "factor": config.head_factor}],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    total = config.steps(len(numbers))
    batches = own_examples(images, numbers, total, config, ranks, seed)
    for step, examples in enumerate(shown(batches, f"fine-tuning on {title}", total, ranks)):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["factor"] * (1 - step / total) ** 0.9
        _step(network, classifier, [*own, *head], examples, config, ranks)
        optimizer.step()
        # what is no number anywhere soon is so in the bias; looked at seldom, since a GPU waits
        if (step + 1) % 100 == 0 or step + 1 == total:
            _require_numbers(classifier.bias, title, step + 1)


def _require_numbers(bias: Tensor, title: str, steps: int) -> None:
    if not bool(bias.isfinite().all()):
        raise CannotScore(
            f"fine-tuning on {title}: the weights are no numbers after {steps} steps; lower --lr"
        )


def own_examples(
    images: WholeImages,
    numbers: Numbers,
    steps: int,
    config: FinetuneConfig,
    ranks: Ranks,
    seed: int,
) -> Iterator[list[_Example]]:
    """This rank's share of each step's batch, maybe nothing; read ahead by one."""

    def batches() -> Iterator[tuple[int, Numbers]]:
        epoch = 0
        while True:
            order = numbers[generator(seed, _ORDER, epoch).permutation(len(numbers))]
            for first in range(0, len(order), config.batch_size):
                yield epoch, order[first : first + config.batch_size]
            epoch += 1

    def read(number: int, epoch: int) -> _Example:
        image = images.read(number)
        if not config.augment:
            label = resize_nearest(torch.tensor(image.label), (config.size, config.size))
            return image.pixels, label
        pixels, label = augmented(image, config.size, seed, epoch, config.resize)
        return recoloured(pixels, number, seed, epoch), label

    with ThreadPoolExecutor(images.threads) as pool:
        ahead: list[Future[_Example]] = []
        following = batches()
        for step in range(steps + 1):
            current, ahead = ahead, []
            if step < steps:
                epoch, batch = next(following)
                own = batch[ranks.rank :: ranks.world_size].tolist()
                ahead = [pool.submit(read, number, epoch) for number in own]
            if step > 0:
                yield [future.result() for future in current]


def _step(
    network: PixelEncoder | PartialEncoder,
    classifier: LinearClassifier,
    parameters: list[nn.Parameter],
    examples: list[_Example],
    config: FinetuneConfig,
    ranks: Ranks,
) -> None:
    """Gradients of the mean over all labelled pixels of all ranks' examples; a collective."""
    for parameter in parameters:
        parameter.grad = None
    labelled = torch.zeros(1, device=ranks.device)
    for first in range(0, len(examples), config.at_once):
        part = examples[first : first + config.at_once]
        pixels = normalise(torch.stack([pixels for pixels, _ in part]).to(ranks.device))
        labels = torch.stack([label for _, label in part]).to(ranks.device).long()
        with precision(config.precision, ranks.device):
            features = network.features(pixels.contiguous(memory_format=torch.channels_last))
        logits = upsample(classifier.logits(features.float()), (config.size, config.size))
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        labelled += (labels >= 0).sum()
    gradients = [
        torch.zeros_like(one) if one.grad is None else one.grad.contiguous() for one in parameters
    ]
    flat = torch.cat([labelled, *(gradient.flatten() for gradient in gradients)])
    all_reduce_sum(flat, ranks)
    mean = flat[1:] / flat[0].clamp_min(1)
    parts = torch.split(mean, [gradient.numel() for gradient in gradients])
    for parameter, part_of_mean in zip(parameters, parts, strict=True):
        parameter.grad = part_of_mean.view_as(parameter)
