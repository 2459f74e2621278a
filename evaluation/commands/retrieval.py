"""`maskbank evaluate retrieval`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from data_pipeline.labelled import LabelledSet
from evaluation.commands import options as common
from evaluation.commands.kmeans import result_folder
from evaluation.contact_sheets import write_neighbour_sheet
from evaluation.gallery import Belonging
from evaluation.prototypes import PrototypeConfig
from evaluation.result import Result
from evaluation.retrieval import RetrievalConfig, evaluate_retrieval
from trainer.distributed import Ranks, cores_per_rank, same_on_all_ranks


def retrieval(
    network: common.Network,
    bank_shards: Annotated[
        Optional[Path],  # noqa: UP045 (typer)
        typer.Option("--train-shards", "--bank-shards", help="Labelled shards of the bank."),
    ] = None,
    shards: common.Shards = None,
    data_set: common.Named = None,
    root: common.Root = None,
    split: common.Split = None,
    masks: common.Masks = None,
    initial: common.Initial = False,
    output: common.Output = None,
    size: common.Size = None,
    resize: common.Resizing = None,
    foreground: common.Foreground = "logit",
    threshold: common.Threshold = 0.5,
    pooling: common.Pooling = "weighted",
    resolution: Annotated[
        str, typer.Option(help="Pixels that are scored: of the image at --size, or of the label.")
    ] = "image",
    batch_size: common.BatchSize = 16,
    mean: common.Averaged = None,
    precision: common.Precision = "float32",
    device: common.Device = "auto",
    html: common.Html = False,
) -> None:
    """Each mask takes the class of its nearest neighbour: mIoU over all classes and over seven.

    Examples: `maskbank evaluate retrieval runs/voc --data-set voc --root VOCSegmentation`;
    `maskbank evaluate retrieval runs/mine --train-shards shards/train --shards shards/val`
    """
    with same_on_all_ranks():
        source = common.source(data_set, root, split, masks)
        prototype: dict[str, Any] = {"foreground": foreground, "pooling": pooling}
        where: Any = resolution  # the configuration checks it
        config = RetrievalConfig(
            source.size(size),
            PrototypeConfig(**prototype, threshold=threshold),
            where,
            batch_size,
            precision,
            source.resize(resize),
            source.mean(mean),
        )
        subject = common.open_subject(network, initial, output)
        config.require(subject.encoder)
        bank = source.open("bank", bank_shards, "--train-shards")
        samples = source.open("test", shards, "--shards")
    ranks = common.start(device)
    for one in (samples, bank):
        common.check_samples(one, ranks)
    results = run_retrieval(subject, bank, samples, config, source.name, ranks)
    common.finish(results, subject, source, ranks, html)


def run_retrieval(
    subject: common.Subject,
    bank: LabelledSet,
    samples: LabelledSet,
    config: RetrievalConfig,
    data_set: str,
    ranks: Ranks,
    pictures: bool = True,
) -> list[Result]:
    """Evaluates, and writes some queries with their neighbours for the report."""
    results, neighbours = evaluate_retrieval(
        subject.encoder, bank, samples, config, ranks, subject.name, cores_per_rank()
    )
    results = common.own_rows(results, samples, subject, data_set, ranks)
    # of the row without a name of its own, as the examples of K-means
    pictures = pictures and "@" not in results[0].protocol
    if pictures and ranks.is_main and len(neighbours.queries) > 0:
        path = result_folder(subject.folder, data_set) / f"neighbours-{subject.name}.npz"
        belonging = Belonging(samples.classes, results[0].protocol, subject.name)
        write_neighbour_sheet(subject.encoder, bank, samples, config, neighbours, belonging, path)
    return results
