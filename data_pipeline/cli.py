"""Command line of the data pipeline: `maskbank shards …`."""

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from data_pipeline.errors import InputError
from data_pipeline.manifest import Manifest
from data_pipeline.sources.item import Listing, read_class_names
from data_pipeline.write_shards import FAILURES, BuildConfig, build_shards, failure_counts

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")
build_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(build_app, name="build", help="Pack images, masks and labels into WebDataset shards.")

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the shards (new).")]
PerShard = Annotated[int, typer.Option(help="Samples a shard.")]
MaskModeOption = Annotated[
    str, typer.Option(help="How mask values are read: auto, binary (half and above), ids.")
]
ShuffleSeed = Annotated[int, typer.Option(help="Seed of the shuffle over shards; -1: key order.")]
Processes = Annotated[int, typer.Option("--processes", "-p", min=1, help="Worker processes.")]
console = Console(stderr=True)


@app.callback()
def shards() -> None:
    """Prepare shards for training and evaluation."""


@build_app.command()
def folder(
    images: Annotated[Path, typer.Option(help="Folder of images, searched recursively.")],
    output: Output,
    masks: Annotated[Path | None, typer.Option(help="Folder of masks, same stems.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Folder of class-index labels.")] = None,
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line.")] = None,
    samples_per_shard: PerShard = 1000,
    mask_mode: MaskModeOption = "auto",
    shuffle_seed: ShuffleSeed = 0,
    processes: Processes = 2,
) -> None:
    """Images and masks in two folders, matched by relative path and stem.

    Example: `maskbank shards build folder --images photos --masks masks -o shards/train`
    """
    from data_pipeline.sources.folder import list_folder

    if (labels is None) != (classes is None):
        raise InputError(
            "--labels and --classes go together: evaluation needs a name for every class index; "
            "give both, or neither"
        )
    names = () if classes is None else read_class_names(classes)
    listing = list_folder(images, masks, labels, names)
    _build(listing, output, samples_per_shard, mask_mode, shuffle_seed, processes)


@build_app.command()
def voc(
    root: Annotated[Path, typer.Option(help="The PASCAL tree: released layout or VOCdevkit.")],
    split: Annotated[str, typer.Option(help="Name of the split's list: trainaug, train, val.")],
    output: Output,
    masks: Annotated[str | None, typer.Option(help="Folder of masks, in the tree or not.")] = None,
    labels: Annotated[bool, typer.Option(help="Take the labels along.")] = True,
    samples_per_shard: PerShard = 1000,
    mask_mode: MaskModeOption = "auto",
    shuffle_seed: ShuffleSeed = 0,
    processes: Processes = 2,
) -> None:
    """A split of PASCAL VOC, in the released archive's layout or VOCdevkit's.

    Example: `maskbank shards build voc --root VOCSegmentation --split trainaug
    --masks saliency_unsupervised_model -o shards/trainaug`
    """
    from data_pipeline.sources.voc import list_voc

    listing = list_voc(root, split, masks, labels)
    _build(listing, output, samples_per_shard, mask_mode, shuffle_seed, processes)


@build_app.command()
def scenes(
    output: Output,
    count: Annotated[int, typer.Option(help="Scenes to generate.")] = 1000,
    size: Annotated[int, typer.Option(help="About how many pixels a side.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the series; another for another split.")] = 0,
    samples_per_shard: PerShard = 1000,
    shuffle_seed: ShuffleSeed = 0,
    processes: Processes = 2,
) -> None:
    """Generated scenes with masks and labels: data to try everything on.

    Example: `maskbank shards build scenes --count 1000 -o shards/scenes`
    """
    from data_pipeline.sources.generated import list_scenes

    listing = list_scenes(count, seed, size)
    _build(listing, output, samples_per_shard, "ids", shuffle_seed, processes)


def _build(
    listing: Listing,
    output: Path,
    samples_per_shard: int,
    mask_mode: str,
    shuffle_seed: int,
    processes: int,
) -> None:
    if mask_mode not in ("auto", "binary", "ids"):
        raise InputError(f"--mask-mode is {mask_mode!r}; it can be auto, binary or ids")
    config = BuildConfig(samples_per_shard, mask_mode, shuffle_seed)  # type: ignore[arg-type]
    start = time.monotonic()
    total, done, failed = len(listing.items), 0, len(listing.failures)
    with Progress(
        TextColumn("building"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples · {task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,  # the table at the end says the same, and an error stands alone
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=total, failed=failed)

        def advance(more: int, failures: int) -> None:
            nonlocal done, failed
            before, done, failed = done, done + more, failed + failures
            bar.update(task, completed=done, failed=failed)
            if not console.is_terminal and 10 * before // total < 10 * done // total:
                print(
                    f"building: {done:,} of {total:,} samples, {failed:,} failed", file=sys.stderr
                )

        try:
            manifest = build_shards(listing, output, config, processes, advance)
        except KeyboardInterrupt:  # the framework would print a bare "Aborted"
            raise _Interrupted from None
    _summary(manifest, time.monotonic() - start)


def _summary(manifest: Manifest, seconds: float) -> None:
    console.print(Text(str(manifest.root)), soft_wrap=True)  # a title would break at the table
    table = Table(show_header=False)
    table.add_row("samples", f"{manifest.samples:,}")
    for name in ("masks", "labels"):
        count = sum(getattr(shard, name) for shard in manifest.shards)
        table.add_row(f"with {name}", f"{count:,}")
    table.add_row("classes", f"{len(manifest.classes):,}")
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("size", f"{manifest.bytes / 2**20:,.1f} MiB")
    table.add_row("time", f"{seconds:.1f} s")
    if manifest.failures:
        where = Text(f"{manifest.failures:,}: see {manifest.root / FAILURES}", overflow="fold")
        table.add_row("[red]failed[/]", where)
    console.print(table)
    if manifest.failures:
        for reason, count in list(failure_counts(manifest.root).items())[:10]:
            console.print(f"  {count:>7,}  {reason}", markup=False, highlight=False, soft_wrap=True)


class _Interrupted(Exception):
    """Ctrl-C during a build, after everything has been put in order."""


def main(arguments: list[str] | None = None) -> None:
    try:
        app(args=arguments, prog_name="maskbank shards")
    except InputError as error:
        print(f"maskbank: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"maskbank: {what}", file=sys.stderr)
        sys.exit(1)
    except (_Interrupted, KeyboardInterrupt):
        print(
            "maskbank: interrupted; run the same command again to go on: finished shards are kept",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
