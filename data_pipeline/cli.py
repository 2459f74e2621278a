"""Command line of the data pipeline: `maskbank shards …`."""

import sys
import time
from pathlib import Path
from typing import Annotated, Optional

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

from data_pipeline.errors import InputError
from data_pipeline.manifest import Manifest
from data_pipeline.sources.item import Listing
from data_pipeline.write_shards import FAILURES, BuildConfig, build_shards, failure_counts

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")
build_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(
    build_app, name="build", help="Pack images, masks and labels into WebDataset shards."
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the shards (new).")]
PerShard = Annotated[int, typer.Option(help="Samples a shard.")]
MaskModeOption = Annotated[
    str, typer.Option(help="How mask values are read: auto, binary (half and above), ids.")
]
ShuffleSeed = Annotated[int, typer.Option(help="Seed of the shuffle over shards; -1: key order.")]
Processes = Annotated[int, typer.Option("--processes", "-p", help="Worker processes.")]
console = Console(stderr=True)


@app.callback()
def shards() -> None:
    """Prepare shards for training and evaluation."""


@build_app.command()
def folder(
    images: Annotated[Path, typer.Option(help="Folder of images, searched recursively.")],
    output: Output,
    masks: Annotated[Optional[Path], typer.Option(help="Folder of masks, same stems.")] = None,  # noqa: UP045 (typer)
    labels: Annotated[Optional[Path], typer.Option(help="Folder of class-index labels.")] = None,  # noqa: UP045
    classes: Annotated[Optional[Path], typer.Option(help="File of class names, one a line.")] = None,  # noqa: UP045
    samples_per_shard: PerShard = 1000,
    mask_mode: MaskModeOption = "auto",
    shuffle_seed: ShuffleSeed = 0,
    processes: Processes = 2,
) -> None:
    """Images and masks in two folders, matched by relative path and stem.

    Example: `maskbank shards build folder --images photos --masks masks -o shards/train`
    """
    from data_pipeline.sources.folder import list_folder

    names = () if classes is None else _class_names(classes)
    listing = list_folder(images, masks, labels, names)
    _build(listing, output, samples_per_shard, mask_mode, shuffle_seed, processes)


@build_app.command()
def voc(
    root: Annotated[Path, typer.Option(help="The PASCAL tree: released layout or VOCdevkit.")],
    split: Annotated[str, typer.Option(help="Name of the split's list: trainaug, train, val.")],
    output: Output,
    masks: Annotated[Optional[str], typer.Option(help="Folder of masks, in the tree or not.")] = None,  # noqa: UP045
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
    with Progress(
        TextColumn("building"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples · {task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("", total=len(listing.items), failed=len(listing.failures))
        failed = len(listing.failures)

        def advance(done: int, failures: int) -> None:
            nonlocal failed
            failed += failures
            bar.update(task, advance=done, failed=failed)

        manifest = build_shards(listing, output, config, processes, advance)
    _summary(manifest, time.monotonic() - start)


def _summary(manifest: Manifest, seconds: float) -> None:
    table = Table(title=str(manifest.root), show_header=False, title_justify="left")
    table.add_row("samples", f"{manifest.samples:,}")
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("size", f"{manifest.bytes / 2**20:,.1f} MiB")
    table.add_row("classes", str(len(manifest.classes)) if manifest.classes else "no labels")
    table.add_row("time", f"{seconds:.1f} s")
    if manifest.failures:
        table.add_row("[red]failed[/]", f"{manifest.failures:,}: see {manifest.root / FAILURES}")
    console.print(table)
    if manifest.failures:
        for reason, count in list(failure_counts(manifest.root).items())[:10]:
            console.print(f"  {count:>7,}  {reason}", markup=False, soft_wrap=True)


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a list of class names ({error})") from None
    return tuple(line.strip() for line in lines if line.strip())


def main(arguments: list[str] | None = None) -> None:
    try:
        app(args=arguments, prog_name="maskbank shards")
    except InputError as error:
        print(f"maskbank: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"maskbank: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
