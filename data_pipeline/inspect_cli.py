"""`maskbank shards verify|quarantine|reindex|records|stats`: what is there and is wrong with it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from data_pipeline.errors import InputError
from data_pipeline.files import require_writable_file
from data_pipeline.manifest import FAILURES, FILE_NAME, read_manifest
from data_pipeline.sources.item import read_class_names
from data_pipeline.storage import is_remote
from data_pipeline.terminal import console, progress_bar
from data_pipeline.verify import Level, Problem, read_problems, verify_shards, write_problems

MAX_SHOWN = 50  # problems or failures printed; all of them go to a file
Root = Annotated[str, typer.Argument(help="Folder of shards.")]
Processes = Annotated[int, typer.Option("--processes", "-p", min=1, help="Worker processes.")]
Fast = Annotated[bool, typer.Option("--fast", help="Sizes and indexes only.")]
Hash = Annotated[bool, typer.Option("--hash", help="Every byte; the default.")]
Decode = Annotated[bool, typer.Option("--decode", help="Every byte, and every pixel decoded.")]


def add_commands(app: typer.Typer) -> None:
    """Mounts the commands of this file."""
    app.command()(verify)
    app.command()(quarantine)
    app.command()(reindex)
    app.command()(records)
    app.command()(stats)


def verify(
    root: Root,
    fast: Fast = False,
    every_byte: Hash = False,
    decode: Decode = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write all problems, as JSON lines.")
    ] = None,
    processes: Processes = 2,
) -> None:
    """Check shards against their manifest; exit status 1 if anything does not fit.

    Example: `maskbank shards verify shards/train --output problems.jsonl`
    """
    if output is not None:
        require_writable_file(output)
    problems = _verify(_folder(root), _level(fast, every_byte, decode), processes)
    if output is not None:
        write_problems(output, problems)
    _show_problems(problems, output)
    if problems:
        raise typer.Exit(1)


def quarantine(
    root: Root,
    problems: Annotated[
        Path | None, typer.Option(help="What `verify --output` wrote; without it, verifies now.")
    ] = None,
    fast: Fast = False,
    every_byte: Hash = False,
    decode: Decode = False,
    restore: Annotated[
        bool, typer.Option("--restore", help="Put back what is whole again.")
    ] = False,
    processes: Processes = 2,
) -> None:
    """Take bad samples out of the index of their shards; the tars stay as they are.

    Example: `maskbank shards quarantine shards/train --problems problems.jsonl`
    """
    from data_pipeline.quarantine import LOG, quarantine_samples
    from data_pipeline.restore import restore_samples

    if restore and problems is not None:
        raise InputError("--restore and --problems are two things; do one after the other")
    folder = _folder(root)
    if restore:
        with _bar("reading", None) as advance:
            done = restore_samples(folder, processes, lambda name: advance(1))
        print_lines([f"put back {done.samples:,} samples; {done.dropped:,} whole shards of them"])
    else:
        level = _level(fast, every_byte, decode)
        found = read_problems(problems) if problems else _verify(folder, level, processes)
        with _bar("reading", None) as advance:
            done = quarantine_samples(folder, found, processes, lambda name: advance(1))
        print_lines(
            [
                f"took {done.samples:,} samples out, {done.dropped:,} whole shards among them; "
                f"{done.indexes:,} indexes made anew",
                f"reasons: {folder / LOG}",
            ]
        )
    print_lines([f"{done.manifest.samples:,} samples in {len(done.manifest.shards):,} shards now"])
    _show("left as it is", list(done.left))


def reindex(
    root: Annotated[str, typer.Argument(help="Folder of tars.")],
    mask_ext: Annotated[str, typer.Option(help="What masks are called after KEY.")] = "mask.png",
    label_ext: Annotated[str, typer.Option(help="What labels are called.")] = "label.png",
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Make a manifest anew.")] = False,
    processes: Processes = 2,
) -> None:
    """Index tars that others made, or whose indexes were lost; the tars stay as they are.

    Example: `maskbank shards reindex downloads --mask-ext seg.png`
    """
    from data_pipeline.reindex import ADVICE, reindex_tars
    from data_pipeline.tar_samples import MemberNames

    names = MemberNames(mask_ext.removeprefix("."), label_ext.removeprefix("."))
    known = () if classes is None else read_class_names(classes)
    folder = _folder(root)
    total = len(list(folder.glob("*.tar"))) if folder.is_dir() else 0
    with _bar("indexing", total) as advance:
        done = reindex_tars(folder, names, known, force, processes, lambda tar: advance(1))
    manifest = done.manifest
    print_lines(
        [f"{folder / FILE_NAME}: {manifest.samples:,} samples in {len(manifest.shards):,} tars"]
    )
    if done.dropped_labels:
        print_lines(
            [f"{done.dropped_labels:,} labels left out: name their classes with --classes FILE"]
        )
    if done.failures:
        lines = [f"{done.failures:,} cannot be read in place, see {folder / FAILURES}; {ADVICE}"]
        print_lines([*lines, *_first_failures(folder / FAILURES)])


def records(root: Root, processes: Processes = 2) -> None:
    """Write the .records that single samples are read by, where they are missing or damaged.

    Sets of earlier versions have none; training reads whole indexes then, in more time and memory.

    Example: `maskbank shards records shards/train`
    """
    from data_pipeline.write_records import rewrite_records

    folder = _folder(root)
    with _bar("writing", len(read_manifest(folder, check_files=False).shards)) as advance:
        done = rewrite_records(folder, processes, lambda: advance(1))
    print_lines([f"wrote the records of {done.written:,} of {done.shards:,} shards"])
    _show(f"{len(done.problems):,} could not be written", list(done.problems))
    if done.problems:
        raise typer.Exit(1)


def stats(
    root: Root,
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Samples decoded; 0: all.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of samples.")] = 0,
    pictures: Annotated[int, typer.Option(min=0, help="Pictures on the page.")] = 48,
    processes: Processes = 2,
) -> None:
    """Count and measure what shards hold: sizes, objects, classes.

    Example: `maskbank shards stats shards/train --html stats.html`
    """
    from data_pipeline.stats import collect_stats, summary_rows

    folder, shown = _folder(root), pictures if html is not None else 0
    if html is not None:
        require_writable_file(html, "--html")
    with _bar("counting", len(read_manifest(folder, check_files=False).shards)) as advance:
        found = collect_stats(folder, sample, seed, shown, processes, lambda: advance(1))
    table = Table(show_header=False)
    for name, value in summary_rows(found):
        table.add_row(name, Text(value, overflow="fold"))
    console.print(table)
    if html is not None:
        from data_pipeline.stats_page import write_page

        write_page(found, html)
        print_lines([f"written: {html}"])


def _folder(root: str) -> Path:
    if is_remote(root):
        raise InputError(f"{root} is elsewhere; copy it to a folder of this machine first")
    return Path(root)


def print_lines(lines: Sequence[str]) -> None:
    """As they are: a path may hold what would be markup, and is not broken."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _level(fast: bool, every_byte: bool, decode: bool) -> Level:
    given: dict[Level, bool] = {"fast": fast, "hash": every_byte, "decode": decode}
    chosen = [level for level in given if given[level]]
    if len(chosen) > 1:
        raise InputError(f"--{' and --'.join(chosen)} are two levels; give one")
    return chosen[0] if chosen else "hash"


def _verify(root: Path, level: Level, processes: int) -> list[Problem]:
    try:
        total: int | None = len(read_manifest(root, check_files=False).shards)
    except InputError:
        total = None  # told as a problem, or again
    with _bar("verifying", total) as advance:
        return verify_shards(root, level, processes, lambda check: advance(1))


def _show_problems(problems: list[Problem], output: Path | None) -> None:
    if not problems:
        print_lines(["all is well"])
        return
    lines = [str(problem) for problem in problems]
    _show(f"{len(problems):,} problems", lines)
    if output is not None:
        print_lines([f"all of them: {output}"])


def _show(title: str, lines: list[str]) -> None:
    if not lines:
        return
    print_lines([f"{title}:", *(f"  {line}" for line in lines[:MAX_SHOWN])])
    if len(lines) > MAX_SHOWN:
        print_lines([f"  … and {len(lines) - MAX_SHOWN:,} more"])


def _first_failures(path: Path) -> Iterator[str]:
    import json

    with path.open("rb") as file:
        for _, line in zip(range(10), file, strict=False):
            failure = json.loads(line)
            yield f"  {failure['source']}: {failure['stage']}: {failure['reason']}"


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of shards, where someone is looking."""
    with progress_bar() as bar:
        task = bar.add_task(f"{title} shards", total=total)
        yield lambda more: bar.advance(task, more)
