"""`maskbank evaluate linear`."""

from typing import Annotated

import typer

from evaluation.commands import options as common
from evaluation.linear_probe import LinearConfig, evaluate_linear, require_comparable
from trainer.distributed import cores_per_rank, same_on_all_ranks


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
    epochs: Annotated[int, typer.Option(help="Epochs of the classifier.")] = 60,
    decay_epoch: Annotated[int, typer.Option(help="The rate is a tenth after it.")] = 25,
    batch_size: Annotated[int, typer.Option(help="Images a step, over all ranks.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.1,
    augment: Annotated[bool, typer.Option(help="Flip, rotate, scale; else cache features.")] = True,
    select: Annotated[str, typer.Option(help="best epoch (published) or last.")] = "best",
    evaluate_every: Annotated[int, typer.Option(help="Epochs between scorings.")] = 1,
    seeds: Annotated[int, typer.Option(help="Classifiers, from seed 0 on.")] = 1,
    precision: common.Precision = "float32",
    device: common.Device = "auto",
    html: common.Html = False,
) -> None:
    """Linear classifier mIoU on frozen features, the published protocol by default.

    Examples: `maskbank evaluate linear runs/demo --train-shards shards/train --shards shards/val`;
    `maskbank evaluate linear runs/voc --data-set voc --root VOCSegmentation`
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
        )
        subject = common.open_subject(network, initial, output)
        train = source.open("train", train_shards, "--train-shards")
        test = source.open("test", shards, "--shards")
        require_comparable(train, test)
    ranks = common.start(device)
    for samples in (test, train):
        common.check_samples(samples, ranks)
    result = evaluate_linear(
        subject.encoder, train, test, config, ranks, subject.name, cores_per_rank()
    )
    common.finish([result], subject, source, ranks, html)
