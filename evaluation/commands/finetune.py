"""`maskbank evaluate finetune`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from data_pipeline.errors import InputError
from data_pipeline.labelled import LabelledSet
from evaluation.commands import options as common
from evaluation.commands.linear import Crf
from evaluation.crf import CrfConfig
from evaluation.finetune import FinetuneConfig, evaluate_finetune
from evaluation.label_splits import Numbers, drawn_splits, listed_splits, present_classes
from evaluation.linear_probe import require_comparable
from evaluation.result import Result
from trainer.distributed import Ranks, cores_per_rank, same_on_all_ranks

FRACTIONS = (1.0, 2.0, 5.0, 12.5, 100.0)  # percent; of the paper
_PUBLISHED = ",".join(f"{share:g}" for share in FRACTIONS)


def finetune(
    network: common.Network,
    train_shards: common.TrainShards = None,
    shards: common.Shards = None,
    data_set: common.Named = None,
    root: common.Root = None,
    split: common.Split = None,
    categories: common.Categories = None,
    initial: common.Initial = False,
    output: common.Output = None,
    fractions: Annotated[
        str, typer.Option(help="Shares of the labels, percent.")
    ] = "1,2,5,12.5,100",
    splits: Annotated[int, typer.Option(help="Draws of each share.")] = 3,
    ids: Annotated[
        Optional[list[Path]],  # noqa: UP045 (typer)
        typer.Option(help="Published lists instead, one key a line; once for each split."),
    ] = None,
    size: common.Size = None,
    resize: common.Resizing = None,
    epochs: Annotated[int, typer.Option(help="Epochs over the share.")] = 30,
    min_steps: Annotated[int, typer.Option(help="At least so many steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Images a step, over all ranks.")] = 16,
    at_once: Annotated[int, typer.Option(help="Images of a rank in one forward pass.")] = 8,
    lr: Annotated[float, typer.Option(help="Of the network; ten times it for the 1×1.")] = 0.004,
    augment: Annotated[bool, typer.Option(help="Flip, rotate, scale, colour.")] = True,
    crf: Crf = False,
    precision: common.Precision = "float32",
    device: common.Device = "auto",
    html: common.Html = False,
) -> None:
    """Fine-tune all of the network on a share of the labels (semi-supervised; our recipe).

    The draws are balanced over the classes, and smaller ones are contained in larger ones.

    Examples: `maskbank evaluate finetune runs/voc --data-set voc --root VOCSegmentation`;
    `maskbank evaluate finetune runs/mine --train-shards shards/train --shards shards/val
    --fractions 1,10 --splits 5`
    """
    with same_on_all_ranks():
        source = common.source(data_set, root, split, None, None, categories)
        config = FinetuneConfig(
            size=source.size(size),
            epochs=epochs,
            min_steps=min_steps,
            batch_size=batch_size,
            at_once=at_once,
            lr=lr,
            augment=augment,
            precision=precision,
            crf=CrfConfig() if crf else None,
            resize=source.resize(resize),
        )
        shares = parse_fractions(fractions, splits)
        subject = common.open_subject(network, initial, output)
        train = source.open("train", train_shards, "--train-shards")
        test = source.open("test", shards, "--shards")
        require_comparable(train, test)
        listed = listed_splits(ids, train) if ids else None
    ranks = common.start(device)
    for samples in (test, train):
        common.check_samples(samples, ranks)
    results = run_finetune(subject, train, test, config, ranks, shares, splits, listed)
    results = common.own_rows(results, test, subject, source.name, ranks)
    common.finish(results, subject, source, ranks, html)


def parse_fractions(text: str, splits: int) -> tuple[float, ...]:
    """Percent, without repetition.

    Raises:
        InputError: no numbers, or none above 0 and up to 100, or no split.
    """
    try:
        shares = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 100 for share in shares):
        raise InputError(f"--fractions is {text!r}; give percent above 0 and up to 100, as 1,12.5")
    if splits < 1:
        raise InputError(f"--splits is {splits}; it must be at least 1")
    return shares


def run_finetune(
    subject: common.Subject,
    train: LabelledSet,
    test: LabelledSet,
    config: FinetuneConfig,
    ranks: Ranks,
    fractions: tuple[float, ...] = FRACTIONS,
    splits: int = 3,
    listed: dict[float, list[Numbers]] | None = None,
) -> list[Result]:
    """Results of protocol finetune-SHARE and, with a CRF, finetune-crf-SHARE, share by share.

    Args:
        subject: the network, which stays as it is.
        train, test: images to learn on and to score.
        config: the recipe.
        ranks: that share the work.
        fractions, splits: shares in percent, and draws of each.
        listed: images by share instead (`label_splits.listed_splits`).
    """
    threads = cores_per_rank()
    chosen = listed or drawn_splits(present_classes(train, ranks, threads), fractions, splits)
    return evaluate_finetune(
        subject.encoder, train, test, chosen, config, ranks, subject.name, threads
    )
