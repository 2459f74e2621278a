"""Command line of the evaluations: `maskbank evaluate …`; under torchrun they share the work."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.manifest import read_manifest
from evaluation.cluster import ClusterConfig
from evaluation.examples import write_examples
from evaluation.features import require_labelled
from evaluation.kmeans import KMeansConfig, evaluate_kmeans
from evaluation.linear_probe import LinearConfig, evaluate_linear, require_comparable
from evaluation.prototypes import PrototypeConfig
from evaluation.report import write_report
from evaluation.result import Result
from trainer.distributed import (
    Ranks,
    cores_per_rank,
    end_ranks,
    same_on_all_ranks,
    start_ranks,
)
from trainer.encoder import load_encoder

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")
console = Console(width=None)

Run = Annotated[Path, typer.Argument(help="Run directory of a training.")]
Shards = Annotated[Path, typer.Option(help="Labelled shards to score on.")]
Initial = Annotated[bool, typer.Option("--initial", help="Score the network before training.")]
Size = Annotated[int, typer.Option(help="Images are resized to this side, pixels.")]
Precision = Annotated[str, typer.Option(help="float32 or bf16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.callback()
def evaluate() -> None:
    """Measure what a trained network knows, on labelled shards."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")


@app.command()
def kmeans(
    run: Run,
    shards: Shards,
    initial: Initial = False,
    size: Size = 512,
    clusters: Annotated[int, typer.Option(help="K; 0: the classes without background.")] = 0,
    foreground: Annotated[str, typer.Option(help="Threshold on: logit or probability.")] = "logit",
    threshold: Annotated[float, typer.Option(help="Of a pixel that is foreground.")] = 0.5,
    pooling: Annotated[str, typer.Option(help="weighted (published) or normalized.")] = "weighted",
    method: Annotated[str, typer.Option(help="minibatch (published) or full.")] = "minibatch",
    starts: Annotated[int, typer.Option(help="Starts of K-means, the best is kept.")] = 3,
    pca: Annotated[int, typer.Option(help="Whitened PCA to so many; 0: none.")] = 32,
    seeds: Annotated[int, typer.Option(help="Clusterings, from seed 1234 on.")] = 5,
    criterion: Annotated[str, typer.Option(help="Matching on iou or count.")] = "iou",
    many_to_one: Annotated[
        bool, typer.Option("--many-to-one", help="Each cluster its best class (over-clustering).")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.")] = 16,
    examples: Annotated[int, typer.Option(help="Pictures kept for the report.")] = 12,
    precision: Precision = "float32",
    device: Device = "auto",
) -> None:
    """K-means mIoU, the published protocol by default.

    Example: `maskbank evaluate kmeans runs/demo --shards shards/val`
    """
    # the configurations check what is text here
    prototype: dict[str, Any] = {"foreground": foreground, "pooling": pooling}
    cluster: dict[str, Any] = {"clusters": clusters, "method": method, "starts": starts, "pca": pca}
    matching: dict[str, Any] = {"criterion": criterion, "many_to_one": many_to_one}
    with same_on_all_ranks():
        config = KMeansConfig(
            size=size,
            prototype=PrototypeConfig(**prototype, threshold=threshold),
            cluster=ClusterConfig(**cluster, seeds=tuple(range(1234, 1234 + seeds))),
            **matching,
            batch_size=batch_size,
            precision=precision,
        )
        encoder, manifest = load_encoder(run, initial), read_manifest(shards)
        require_labelled(manifest)
    ranks = _start(device)
    network = "initial" if initial else "trained"
    result, clustering = evaluate_kmeans(
        encoder, manifest, config, ranks, network, cores_per_rank()
    )
    if ranks.is_main and examples > 0:
        folder = run / "evaluation"
        folder.mkdir(exist_ok=True)
        path = folder / f"examples-{network}.npz"
        write_examples(encoder, manifest, config, clustering, path, examples)
    _finish(result, run, ranks)


@app.command()
def linear(
    run: Run,
    train_shards: Annotated[Path, typer.Option(help="Labelled shards to learn on.")],
    shards: Shards,
    initial: Initial = False,
    size: Size = 512,
    epochs: Annotated[int, typer.Option(help="Epochs of the classifier.")] = 60,
    decay_epoch: Annotated[int, typer.Option(help="The rate is a tenth after it.")] = 25,
    batch_size: Annotated[int, typer.Option(help="Images a step, over all ranks.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.1,
    augment: Annotated[bool, typer.Option(help="Flip, rotate, scale; else cache features.")] = True,
    select: Annotated[str, typer.Option(help="best epoch (published) or last.")] = "best",
    evaluate_every: Annotated[int, typer.Option(help="Epochs between scorings.")] = 1,
    seeds: Annotated[int, typer.Option(help="Classifiers, from seed 0 on.")] = 1,
    precision: Precision = "float32",
    device: Device = "auto",
) -> None:
    """Linear classifier mIoU on frozen features, the published protocol by default.

    Example: `maskbank evaluate linear runs/demo --train-shards shards/train --shards shards/val`
    """
    with same_on_all_ranks():
        config = LinearConfig(
            size=size,
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
        encoder = load_encoder(run, initial)
        train, test = read_manifest(train_shards), read_manifest(shards)
        require_comparable(train, test)
    ranks = _start(device)
    network = "initial" if initial else "trained"
    result = evaluate_linear(encoder, train, test, config, ranks, network, cores_per_rank())
    _finish(result, run, ranks)


@app.command()
def report(
    run: Run,
    output: Annotated[Optional[Path], typer.Option(help="Where; default RUN/report.html.")] = None,  # noqa: UP045 (typer)
) -> None:
    """One self-contained HTML page about a run: numbers, pictures, curves, tables.

    Example: `maskbank evaluate report runs/demo`
    """
    console.print(f"report: {write_report(run, output)}", soft_wrap=True)


def _start(device: str) -> Ranks:
    ranks = start_ranks(device, timeout_seconds=1800)
    if ranks.device.type == "cpu":
        torch.set_num_threads(cores_per_rank())
    return ranks


def _finish(result: Result, run: Path, ranks: Ranks) -> None:
    if ranks.is_main:
        path = result.write(run)
        result.show(console)
        console.print(f"written: {path}", soft_wrap=True)
    end_ranks()


def main(arguments: list[str] | None = None) -> None:
    rank = os.environ.get("RANK", "0")
    speaker = "maskbank" if rank == "0" else f"maskbank: rank {rank}"
    try:
        app(args=arguments, prog_name="maskbank evaluate")
    except InputError as error:
        print(f"{speaker}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        print(f"{speaker}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
