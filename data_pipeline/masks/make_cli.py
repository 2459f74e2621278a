"""What all `maskbank masks make …` commands share: options, progress, the table at the end."""

import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from data_pipeline.errors import InputError
from data_pipeline.masks.methods import Method
from data_pipeline.progress import ETA
from data_pipeline.terminal import (
    Interrupted,
    console,
    option,
    print_tenths,
    progress_bar,
    with_shared_options,
)

_MASK, _WHERE = "What a mask is", "Where and by whom"
_MOST_REASONS = 10


_mask, _where = map(option, (_MASK, _WHERE))


def shared_options(
    images: Annotated[str, typer.Option(help="Folder of pictures, searched recursively.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for the masks: new, or of this very command."),
    ],
    threshold: Annotated[
        str,
        _mask(
            "Saliency from which on a pixel is object: a number as 0.5, otsu (parts each map into "
            "two classes), or mean (twice each map's mean)."
        ),
    ] = "0.5",
    min_segment: Annotated[
        float, _mask("Connected segments under this share of the picture are dropped.")
    ] = 0.01,
    min_mask: Annotated[
        float, _mask("Pictures get no mask if it is under this share of the picture.")
    ] = 0.01,
    ids: Annotated[
        bool, _mask("Write segments as object ids 1…254 instead of one mask of 255.", "--ids")
    ] = False,
    processes: Annotated[
        int, _where("Worker processes; each loads the method.", "--processes", "-p", min=1)
    ] = 1,
    threads: Annotated[
        int, _where("Threads a process; 0: cores / processes.", "--threads", min=0)
    ] = 0,
    node_rank: Annotated[int, _where("Which node this is, from 0.")] = 0,
    num_nodes: Annotated[int, _where("Nodes that share the work and the folder.")] = 1,
) -> None:
    """The options of every method; never called."""


def make_command(
    app: typer.Typer, **defaults: Any
) -> Callable[[Callable[..., Method]], Callable[..., None]]:
    """Makes a command of a function that returns a method: shared options, then its own.

    Args:
        app: that gets the command.
        defaults: of shared options, where this method has others.
    """

    def decorate(choose: Callable[..., Method]) -> Callable[..., None]:
        shared = {
            name: parameter.replace(default=defaults.get(name, parameter.default))
            for name, parameter in inspect.signature(shared_options).parameters.items()
        }

        def run(own: dict[str, Any], given: dict[str, Any]) -> None:
            _make(choose(**own), **given)

        command = with_shared_options(choose, shared, run, shared_first=True)
        app.command()(command)
        return command

    return decorate


def _make(
    method: Method,
    *,
    images: str,
    output: Path,
    threshold: str,
    min_segment: float,
    min_mask: float,
    ids: bool,
    processes: int,
    threads: int,
    node_rank: int,
    num_nodes: int,
) -> None:
    from data_pipeline.masks.make_masks import MakeOptions, make_masks
    from data_pipeline.masks.postprocess import PostprocessConfig
    from data_pipeline.storage import as_location

    config = PostprocessConfig(_threshold(threshold), min_segment, min_mask, ids)
    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    options = MakeOptions(processes, threads, node_rank, num_nodes)
    start = time.monotonic()
    with progress_bar() as bar:
        try:
            report = make_masks(
                as_location(images),
                output,
                method,
                config,
                options,
                lambda total: _advance(bar, total),
            )
        except KeyboardInterrupt:  # the framework would print a bare "Aborted"
            raise Interrupted(
                "interrupted; run the same command again to go on: finished masks are kept"
            ) from None
    _summary(report, output, time.monotonic() - start)


def _threshold(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _advance(bar: Progress, total: int) -> Callable[[int, int, int], None]:
    """Shows what is done, as a bar on a terminal and in tenths elsewhere."""
    done = skipped = failed = 0
    task = bar.add_task("making masks", total=total)

    def advance(more: int, more_skipped: int, more_failed: int) -> None:
        nonlocal done, skipped, failed
        before, done = done, done + more
        skipped, failed = skipped + more_skipped, failed + more_failed
        counts = f"{skipped:,} skipped", f"{failed:,} failed"
        bar.update(task, completed=done, parts=(ETA, *counts))
        if more:
            text = f"making masks: {done:,} of {total:,} pictures, {', '.join(counts)}"
            print_tenths(before, done, total, text)

    return advance


def _summary(report: Any, output: Path, seconds: float) -> None:
    from data_pipeline.write_shards import failure_counts

    console.print(Text(str(output)), soft_wrap=True)  # a title would break at the table
    table = Table(show_header=False)
    table.add_row("masks made", f"{report.made:,}")
    if report.kept:
        table.add_row("there before", f"{report.kept:,}")
    table.add_row("skipped: nothing salient", f"{report.skipped:,}")
    table.add_row("[red]failed[/]" if report.failed else "failed", f"{report.failed:,}")
    speed = f", {1000 * seconds / report.made:,.0f} ms a mask" if report.made else ""
    table.add_row("time", f"{seconds:.1f} s{speed}")
    console.print(table)
    if not report.skipped + report.failed:
        return
    with report.failures.open("rb") as file:
        counts = failure_counts(file)
    for reason, count in list(counts.items())[:_MOST_REASONS]:
        console.print(f"  {count:>7,}  {reason}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"each by name: {report.failures}", markup=False, highlight=False, soft_wrap=True)
    if not report.made + report.kept:
        raise InputError(
            "not one picture got a mask; the reasons are above. If the pictures do have objects, "
            "`maskbank masks make onnx` or `spectral` may find them"
        )
