"""What all `maskbank shards build …` commands share: options, progress, the table at the end."""

import inspect
import time
from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from data_pipeline.build_config import (
    BuildConfig,
    BuildOptions,
    parse_max_failures,
    parse_size,
)
from data_pipeline.dry_run import Estimate, estimate
from data_pipeline.manifest import FAILURES, Manifest
from data_pipeline.plan import Plan
from data_pipeline.progress import ETA, log_above_bars
from data_pipeline.sources.item import Listing
from data_pipeline.storage import as_location
from data_pipeline.store import open_store
from data_pipeline.terminal import (
    Interrupted,
    console,
    option,
    print_tenths,
    progress_bar,
    with_shared_options,
)
from data_pipeline.write_shards import build_shards, failure_counts

_WHAT, _HOW, _WHERE = "What goes in", "How it is built", "Where and by whom"

_what, _how, _where = map(option, (_WHAT, _HOW, _WHERE))
_MASK_MODES = (
    "How mask values are read: auto, binary (half and above), ids, components (every connected "
    "part is a proposal)."
)


def shared_options(
    output: Annotated[str, _where("Folder or s3:// address of the shards.", "--output", "-o")],
    samples_per_shard: Annotated[int, _how("Samples a shard, at the most.")] = 1000,
    shard_size: Annotated[str, _how("Source bytes a shard, as 500MB or 1GiB.")] = "",
    max_side: Annotated[int, _how("Make larger images smaller, to these pixels.")] = 0,
    quality: Annotated[int, _how("Of JPEGs that must be encoded again.")] = 95,
    shuffle_seed: Annotated[int, _how("Of the shuffle over all shards; -1: key order.")] = 0,
    append: Annotated[bool, _how("Add to a finished set what is new.", "--append")] = False,
    retry_failed: Annotated[bool, _how("Try again what failed.", "--retry-failed")] = False,
    max_failures: Annotated[str, _how("End the build beyond so many, as 100 or 5%.")] = "",
    dry_run: Annotated[bool, _how("Only say what would be built.", "--dry-run")] = False,
    mask_mode: Annotated[str, _what(_MASK_MODES)] = "auto",
    min_area: Annotated[float, _what("Smallest component, share of the image.")] = 0.01,
    lenient: Annotated[
        bool, _what("Take JPEGs that a decoder only warns about.", "--lenient")
    ] = False,
    limit: Annotated[int, _what("Only so many samples, in shuffled order; 0: all.")] = 0,
    duplicates: Annotated[
        str, _what("Samples with image, mask and label of another: drop or keep.")
    ] = "drop",
    key_prefix: Annotated[str, _what("Put before every key.")] = "",
    processes: Annotated[
        int,
        typer.Option("--processes", "-p", min=1, help="Workers.", rich_help_panel=_WHERE),
    ] = 2,
    node_rank: Annotated[int, _where("Which node this is, from 0.")] = 0,
    num_nodes: Annotated[int, _where("Nodes that build together.")] = 1,
) -> None:
    """The options of every build; never called."""


def build_command(
    app: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., Listing]], Callable[..., None]]:
    """Makes a command of a function that returns a listing: its own options, then all shared ones.

    The listing's `description` holds what of its options decides the content.
    """

    shared = inspect.signature(shared_options).parameters

    def decorate(list_source: Callable[..., Listing]) -> Callable[..., None]:
        def run(own: dict[str, Any], given: dict[str, Any]) -> None:
            _build(list_source(**own), **given)

        command = with_shared_options(list_source, shared, run)
        app.command(name)(command)
        return command

    return decorate


def _build(
    listing: Listing,
    *,
    output: str,
    shard_size: str,
    processes: int,
    node_rank: int,
    num_nodes: int,
    append: bool,
    retry_failed: bool,
    max_failures: str,
    dry_run: bool,
    **given: Any,
) -> None:
    config = BuildConfig(shard_size=parse_size(shard_size), **given)
    options = BuildOptions(
        processes, node_rank, num_nodes, append, retry_failed, parse_max_failures(max_failures)
    )
    if dry_run:
        _show_estimate(estimate(listing, config, processes * num_nodes))
        return
    log_above_bars()
    start = time.monotonic()
    with progress_bar() as bar:
        try:
            manifest = build_shards(
                listing,
                as_location(output),
                config,
                options,
                lambda plan: _advance(bar, plan, retry_failed),
            )
        except KeyboardInterrupt:  # the framework would print a bare "Aborted"
            raise Interrupted(
                "interrupted; run the same command again to go on: finished shards are kept"
            ) from None
    if manifest is None:
        console.print(
            f"node {node_rank} of {num_nodes} is done; the manifest is written by the node that "
            "is done last. Should it be missing in the end, run this command once more",
            soft_wrap=True,
        )
    else:
        _summary(manifest, output, time.monotonic() - start)


def _advance(bar: Progress, plan: Plan, retry_failed: bool) -> Callable[[int, int], None]:
    """Shows what is done, as a bar on a terminal and in tenths elsewhere."""
    total, done, failed = plan.samples, 0, plan.unmatched
    task = bar.add_task("building", total=total)
    if plan.passed_over and not retry_failed:
        console.print(
            f"{plan.passed_over:,} samples are passed over, as their keys are in the set already; "
            "if they are others, --key-prefix gives them keys of their own",
            soft_wrap=True,
        )

    def advance(more: int, failures: int) -> None:
        nonlocal done, failed
        before, done, failed = done, done + more, failed + failures
        bar.update(task, completed=done, parts=(ETA, f"{failed:,} failed"))
        if more:
            text = f"building: {done:,} of {total:,} samples, {failed:,} failed"
            print_tenths(before, done, total, text)

    return advance


def _show_estimate(found: Estimate) -> None:
    table = Table(show_header=False, title="would be built", title_justify="left")
    table.add_row("samples", f"{found.samples:,}")
    table.add_row("shards", f"{found.shards:,}")
    table.add_row("not matched", f"{found.unmatched:,}")
    table.add_row("size, about", f"{found.bytes / 2**20:,.1f} MiB")
    table.add_row("time, about", f"{found.seconds:,.0f} s with {found.processes} processes")
    tried = f"{found.tried:,}, of which {found.failed:,} cannot be used"
    table.add_row("estimated from", tried)
    console.print(table)
    for failure in found.examples:
        text = f"  {failure.source}: {failure.stage}: {failure.reason}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _summary(manifest: Manifest, output: str, seconds: float) -> None:
    console.print(Text(output), soft_wrap=True)  # a title would break at the table
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
        where = Text(f"{manifest.failures:,}: see {output}/{FAILURES}", overflow="fold")
        table.add_row("[red]failed[/]", where)
    console.print(table)
    if manifest.failures:
        with open_store(output).open(FAILURES) as file:
            counts = failure_counts(file)
        for reason, count in islice(counts.items(), 10):
            console.print(f"  {count:>7,}  {reason}", markup=False, highlight=False, soft_wrap=True)
        stages = {reason.partition(":")[0] for reason in counts}
        if stages - {"duplicate", "match"}:
            console.print("Mend them and run the same command with --retry-failed.")
        if "match" in stages:  # these are in no shard yet
            console.print("Mend what was not matched and run the same command with --append.")
