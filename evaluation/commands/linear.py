"""`maskbank evaluate linear`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from data_pipeline.errors import InputError
from data_pipeline.files import require_writable
from data_pipeline.labelled import LabelledSet
from evaluation.commands import options as common
from evaluation.commands.kmeans import result_folder
from evaluation.crf import CrfConfig
from evaluation.linear_classifier import LinearClassifier
from evaluation.linear_probe import (
    LinearConfig,
    evaluate_linear,
    require_comparable,
    score_own_classifier,
)
from evaluation.prototypes import PrototypeConfig
from evaluation.result import Result
from evaluation.saved_head import SavedHead
from trainer.distributed import Ranks, cores_per_rank, same_on_all_ranks

Crf = Annotated[bool, typer.Option("--crf", help="Score with a fully connected CRF as well.")]


def linear(
    network: common.Network,
    train_shards: common.TrainShards = None,
    shards: common.Shards = None,
    data_set: common.Named = None,
    root: common.Root = None,
    split: common.Split = None,
    categories: common.Categories = None,
    initial: common.Initial = False,
    output: common.Output = None,
    size: common.Size = None,
    resize: common.Resizing = None,
    epochs: Annotated[int, typer.Option(help="Epochs of the classifier.")] = 60,
    decay_epoch: Annotated[int, typer.Option(help="From 0 on; the rate is a tenth after it.")] = 25,
    batch_size: Annotated[int, typer.Option(help="Images a step, over all ranks.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.1,
    augment: Annotated[bool, typer.Option(help="Flip, rotate, scale; else cache features.")] = True,
    select: Annotated[str, typer.Option(help="best epoch (published) or last.")] = "best",
    evaluate_every: Annotated[int, typer.Option(help="Epochs between scorings.")] = 1,
    seeds: Annotated[int, typer.Option(help="Classifiers, from seed 0 on.")] = 1,
    crf: Crf = False,
    own_classifier: Annotated[
        bool, typer.Option("--own-classifier", help="Score the one in the network's file.")
    ] = False,
    cache: Annotated[
        Optional[Path],  # noqa: UP045 (typer)
        typer.Option(help="Folder for features, gigabytes; default: that of the results."),
    ] = None,
    mean: common.Averaged = None,
    precision: common.Precision = "float32",
    device: common.Device = "auto",
    html: common.Html = False,
) -> None:
    """Linear classifier mIoU on frozen features, the published protocol by default.

    Writes the scores and the classifier (`maskbank predict` and `evaluate transfer` take it) to
    evaluation/.

    Examples: `maskbank evaluate linear runs/demo --train-shards shards/train --shards shards/val`;
    `maskbank evaluate linear runs/voc --data-set voc --root VOCSegmentation --crf`
    """
    with same_on_all_ranks():
        source = common.source(data_set, root, split, None, None, categories)
        config = LinearConfig(
            size=source.size(size),
            epochs=epochs,
            decay_epoch=decay_epoch,
            batch_size=batch_size,
            lr=lr,
            augment=augment,
            select=select,
            evaluate_every=evaluate_every,
            precision=precision,
            seeds=tuple(range(seeds)),
            crf=CrfConfig() if crf else None,
            resize=source.resize(resize),
            mean=source.mean(mean),
        )
        subject = common.open_subject(network, initial, output)
        if cache is not None:
            require_writable(cache, "--cache")
        sets = _open(source, subject, own_classifier, train_shards, shards)
    ranks = common.start(device)
    for samples in sets:
        common.check_samples(samples, ranks)
    results = run_linear(subject, sets, config, source.name, ranks, cache)
    common.finish(results, subject, source, ranks, html)


def _open(
    source: common.Source,
    subject: common.Subject,
    own_classifier: bool,
    train_shards: Path | None,
    shards: Path | None,
) -> list[LabelledSet]:
    """The set that is scored, and before it the one to learn on, unless there is a classifier."""
    if own_classifier:
        LinearClassifier.of(subject.encoder)
        if train_shards is not None:
            raise InputError("--own-classifier learns nothing; leave --train-shards out")
        return [source.open("test", shards, "--shards")]
    train = source.open("train", train_shards, "--train-shards")
    test = source.open("test", shards, "--shards")
    require_comparable(train, test)
    return [train, test]


def run_linear(
    subject: common.Subject,
    sets: list[LabelledSet],
    config: LinearConfig,
    data_set: str,
    ranks: Ranks,
    cache: Path | None = None,
) -> list[Result]:
    """Results of protocol linear and, with a CRF, linear-crf; writes the classifier beside them.

    Args:
        subject: the network.
        sets: to learn on and to score; or only to score, with the network's own classifier.
        config: the protocol.
        data_set: its name, "" for shards.
        ranks: that share the work.
        cache: folder for features; None takes that of the results.
    """
    folder = result_folder(subject.folder, data_set)
    encoder, last = subject.encoder, (config, ranks, subject.name, cores_per_rank())
    if len(sets) == 1:
        results, classifier = score_own_classifier(encoder, sets[0], *last)
    else:
        train, test = sets
        results, classifier = evaluate_linear(encoder, train, test, *last, cache or folder)
    results = common.own_rows(results, sets[-1], subject, data_set, ranks)
    if ranks.is_main:
        head = SavedHead(
            kind="linear",
            tensors={"weight": classifier.weight, "bias": classifier.bias},
            classes=sets[-1].classes,
            data_set=data_set,
            size=config.size,
            prototype=PrototypeConfig(),
            step=subject.encoder.step,
            resize=config.resize,
        )
        head.write(folder / f"{results[0].protocol}-{subject.name}.safetensors")
    return results
