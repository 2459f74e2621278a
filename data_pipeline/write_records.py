"""Writes the `.records` of shards that lack them, or where they are damaged."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write, only_writer
from data_pipeline.index import read_index
from data_pipeline.manifest import Manifest, ShardEntry, read_manifest
from data_pipeline.records import RecordFile, RecordsUnusable
from data_pipeline.workers import run_tasks


@dataclass(frozen=True)
class Rewritten:
    """What was done.

    Attributes:
        shards: looked at.
        written: of them, whose records were missing, damaged or of another index.
        problems: why others could not be written.
    """

    shards: int
    written: int
    problems: tuple[str, ...]


def rewrite_records(
    root: Path, processes: int = 1, progress: Callable[[], None] = lambda: None
) -> Rewritten:
    """Writes the records of every shard in a folder where they are not as they should be.

    Nothing else is touched.

    Args:
        root: the folder.
        processes: workers.
        progress: called after each shard.

    Raises:
        InputError: no manifest, or another process writes there.
    """
    with only_writer(root):
        manifest = read_manifest(root, check_files=False)
        return rewrite_of(manifest, processes, progress)


def rewrite_of(
    manifest: Manifest, processes: int = 1, progress: Callable[[], None] = lambda: None
) -> Rewritten:
    """`rewrite_records` for who keeps others out already."""
    written, problems = 0, []
    tasks = ((manifest.root, entry) for entry in manifest.shards)
    for done, problem in run_tasks(_write_one, tasks, processes):
        written += done
        if problem:
            problems.append(problem)
        progress()
    return Rewritten(len(manifest.shards), written, tuple(sorted(problems)))


def write_records(root: Path, entry: ShardEntry) -> bool:
    """Writes a shard's records unless they are as they should be; whether it did.

    Raises:
        InputError: the shard's index cannot be used.
    """
    if is_whole(root / entry.records, entry):
        return False
    records = read_index(root, entry)[0].encode_records(entry.index_sha256)
    with atomic_write(root / entry.records) as file:
        file.write(records)
    return True


def is_whole(path: Path, entry: ShardEntry) -> bool:
    """Whether a file holds the records of a shard, every byte as it was written."""
    try:
        RecordFile(path, entry.index_sha256, entry.samples).check()
    except RecordsUnusable:
        return False
    return True


def _write_one(task: tuple[Path, ShardEntry]) -> tuple[bool, str]:
    try:
        return write_records(*task), ""
    except InputError as error:
        return False, str(error)
