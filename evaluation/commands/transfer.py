"""`maskbank evaluate transfer`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from data_pipeline.labelled import LabelledSet
from evaluation.commands import options as common
from evaluation.commands.linear import Crf
from evaluation.crf import CrfConfig
from evaluation.result import Result
from evaluation.saved_head import SavedHead, read_head
from evaluation.transfer import TransferConfig, evaluate_transfer, require_transferable
from trainer.distributed import Ranks, cores_per_rank, same_on_all_ranks


def transfer(
    network: common.Network,
    classifier: Annotated[
        Path,
        typer.Option(
            "--head",
            "--classifier",
            help="linear-NETWORK.safetensors that `evaluate linear` wrote.",
        ),
    ],
    shards: common.Shards = None,
    data_set: common.Named = None,
    root: common.Root = None,
    split: common.Split = None,
    names: common.Names = None,
    categories: common.Categories = None,
    initial: common.Initial = False,
    output: common.Output = None,
    size: common.Size = None,
    resize: Annotated[
        Optional[str],  # noqa: UP045 (typer)
        typer.Option(help="Images to squares: opencv, antialias, crop; default: the classifier's."),
    ] = None,
    unknown: Annotated[
        str, typer.Option(help="Pixels of classes it does not know: ignore or background.")
    ] = "ignore",
    crf: Crf = False,
    batch_size: common.BatchSize = 16,
    precision: common.Precision = "float32",
    device: common.Device = "auto",
    html: common.Html = False,
) -> None:
    """Score a classifier on another data set than it was learned on; classes match by name.

    What it predicts beyond the data set's classes counts as background there. Images are resized to
    the side that the classifier was learned with, unless --size says another.

    Example: `maskbank evaluate transfer runs/voc --data-set coco-stuff-81 --root coco --head
    runs/voc/evaluation/voc/linear-trained.safetensors`
    """
    with same_on_all_ranks():
        source = common.source(data_set, root, split, None, names, categories)
        refined = CrfConfig() if crf else None
        how: Any = resize  # the configuration checks it
        config = TransferConfig(size, unknown, batch_size, precision, refined, how)
        head = read_head(classifier)
        subject = common.open_subject(network, initial, output)
        samples = source.open("test", shards, "--shards")
        require_transferable(subject.encoder, head, samples)
    ranks = common.start(device)
    common.check_samples(samples, ranks)
    results = run_transfer(subject, head, samples, config, ranks)
    results = common.own_rows(results, samples, subject, source.name, ranks)
    common.finish(results, subject, source, ranks, html)


def run_transfer(
    subject: common.Subject,
    head: SavedHead,
    samples: LabelledSet,
    config: TransferConfig,
    ranks: Ranks,
) -> list[Result]:
    """Results of protocol transfer and, with a CRF, transfer-crf."""
    return evaluate_transfer(
        subject.encoder, head, samples, config, ranks, subject.name, cores_per_rank()
    )
