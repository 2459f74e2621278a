"""`maskbank evaluate video`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from data_pipeline.errors import InputError
from data_pipeline.files import require_writable
from data_pipeline.labelled import LabelledSet
from evaluation.commands import options as common
from evaluation.commands.kmeans import result_folder
from evaluation.label_propagation import PropagationConfig
from evaluation.linear_probe import LinearConfig, evaluate_linear, require_comparable
from evaluation.prototypes import PrototypeConfig
from evaluation.result import Result
from evaluation.saved_head import SavedHead, read_head
from evaluation.video import (
    READINGS,
    Reading,
    VideoConfig,
    evaluate_video,
    require_reading,
    sequences_of,
)
from trainer.distributed import Ranks, cores_per_rank, same_on_all_ranks

Write = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder for the masks, as davis-READING/SEQUENCE/00000.png."),
]


def video(
    network: common.Network,
    train_shards: common.TrainShards = None,
    shards: common.Shards = None,
    data_set: common.Named = None,
    root: common.Root = None,
    split: common.Split = None,
    initial: common.Initial = False,
    output: common.Output = None,
    readings: Annotated[
        str, typer.Option(help="Some of saliency, classifier, propagation; commas between.")
    ] = ",".join(READINGS),
    size: common.Size = None,
    foreground: common.Foreground = "logit",
    threshold: common.Threshold = 0.5,
    head: Annotated[
        Optional[Path],  # noqa: UP045 (typer)
        typer.Option(help="A linear classifier of `evaluate linear` or this, instead of learning."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of the classifier.")] = 60,
    decay_epoch: Annotated[int, typer.Option(help="Its rate is a tenth after it.")] = 25,
    augment: Annotated[bool, typer.Option(help="Flip, rotate, scale; else cache features.")] = True,
    features: Annotated[
        str, typer.Option(help="What propagation compares: embedding or decoder.")
    ] = "embedding",
    top_k: Annotated[int, typer.Option(help="Features whose labels one takes.")] = 10,
    context: Annotated[int, typer.Option(help="Latest frames, besides the first.")] = 20,
    radius: Annotated[int, typer.Option(help="Of the neighbourhood, in features; 0: all.")] = 12,
    temperature: Annotated[float, typer.Option(help="Of the similarities.")] = 0.05,
    write: Write = None,
    precision: common.Precision = "float32",
    device: common.Device = "auto",
    html: common.Html = False,
) -> None:
    """Objects of videos, DAVIS-2016: J, F and their mean, in three readings, which are ours.

    `saliency`: the predicted foreground as it is. `classifier`: a linear one, learned on the
    training sequences and written beside the results; of its last epoch, so that the sequences
    that are scored choose nothing. `propagation`: the first frame's mask, carried on by similar
    features.

    Examples: `maskbank evaluate video runs/voc --data-set davis-2016 --root DAVIS`;
    `maskbank evaluate video runs/voc --shards shards/davis-val --readings propagation`
    """
    with same_on_all_ranks():
        source = common.source(data_set, root, split)
        propagation = PropagationConfig(top_k, context, radius, temperature)
        config = _config(source.size(size), foreground, threshold, features, propagation, precision)
        chosen = _readings(readings)
        learning = _learning(config, epochs, decay_epoch, augment)
        subject = common.open_subject(network, initial, output)
        classifier = None if head is None else read_head(head)
        for reading in chosen:
            require_reading(subject.encoder, reading, classifier)
        if write is not None:
            require_writable(write, "--write")
        samples = source.open("test", shards, "--shards")
        sequences_of(samples)
        train = None
        if "classifier" in chosen and classifier is None:
            train = source.open("train", train_shards, "--train-shards")
            require_comparable(train, samples)
    ranks = common.start(device)
    for one in (samples, train):
        if one is not None:
            common.check_samples(one, ranks)
    if train is not None:
        classifier = learn_head(subject, train, samples, learning, source.name, ranks)
    results = run_video(subject, samples, chosen, config, ranks, classifier, write)
    results = common.own_rows(results, samples, subject, source.name, ranks)
    common.finish(results, subject, source, ranks, html)


def _config(
    size: int, foreground: Any, threshold: float, features: Any, propagation: PropagationConfig,
    precision: str,
) -> VideoConfig:  # fmt: skip
    """The options, which the configurations check."""
    prototype = PrototypeConfig(foreground, threshold)
    return VideoConfig(size, prototype, features, propagation, precision)


def _readings(text: str) -> list[Reading]:
    """The readings that an option names, in the order of `READINGS`."""
    named = [name.strip() for name in text.split(",")]
    wrong = [name for name in named if name not in READINGS]
    if wrong:
        raise InputError(f"--readings has {wrong[0]!r}; it can have {', '.join(READINGS)}")
    return [reading for reading in READINGS if reading in named]


def _learning(config: VideoConfig, epochs: int, decay_epoch: int, augment: bool) -> LinearConfig:
    """The published classifier's, but of the last epoch."""
    return LinearConfig(
        size=config.size,
        epochs=epochs,
        decay_epoch=decay_epoch,
        augment=augment,
        select="last",
        evaluate_every=epochs,
        precision=config.precision,
        resize=config.resize,
    )


def learn_head(
    subject: common.Subject,
    train: LabelledSet,
    samples: LabelledSet,
    learning: LinearConfig,
    data_set: str,
    ranks: Ranks,
) -> SavedHead:
    """A classifier learned on the frames of `train`, the same on every rank; a collective.

    Written as davis-classifier-NETWORK.safetensors.
    """
    folder = result_folder(subject.folder, data_set)
    _, learned = evaluate_linear(
        *(subject.encoder, train, samples, learning, ranks, subject.name, cores_per_rank(), folder)
    )
    head = SavedHead(
        kind="linear",
        tensors={"weight": learned.weight, "bias": learned.bias},
        classes=train.classes,
        data_set=data_set,
        size=learning.size,
        prototype=PrototypeConfig(),
        step=subject.encoder.step,
        resize=learning.resize,
    )
    if ranks.is_main:
        head.write(folder / f"davis-classifier-{subject.name}.safetensors")
    return head


def run_video(
    subject: common.Subject,
    samples: LabelledSet,
    readings: list[Reading],
    config: VideoConfig,
    ranks: Ranks,
    head: SavedHead | None = None,
    write: Path | None = None,
) -> list[Result]:
    """One result for each reading."""
    threads = cores_per_rank()
    return [
        evaluate_video(
            *(subject.encoder, samples, one, config, ranks, subject.name, threads, head, write)
        )
        for one in readings
    ]
