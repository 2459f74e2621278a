"""Builds shards: plan, write, finish. The same bytes for any number of processes and nodes.

plan.py decides what goes where before anything is written; shard_file.py writes one shard and marks
it complete; a build that was killed goes on with the shards that are not; finish_build.py drops
duplicates and writes the manifest, on the node that finds all shards complete.
"""

import json
import os
import pickle
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO

from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.build_record import open_record
from data_pipeline.errors import InputError, SampleError
from data_pipeline.files import only_writer
from data_pipeline.finish_build import finish, set_aside
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Plan, PlannedShard, PlanReader
from data_pipeline.records import SUFFIX as RECORDS
from data_pipeline.sample import PackedSample, pack_sample
from data_pipeline.shard_file import (
    DUPLICATE,
    Marker,
    ShardWriter,
    is_whole,
    read_marker_bytes,
    shard_stem,
    write_records,
    write_shard,
)
from data_pipeline.sources.item import Failure, Item, Listing
from data_pipeline.storage import Location
from data_pipeline.store import LocalStore, Store, open_store
from data_pipeline.workers import run_tasks

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Task:
    """One planned shard, and what a worker needs to write it."""

    shard: PlannedShard
    plan: Path
    store: Store
    config: BuildConfig
    num_classes: int | None
    roots: tuple[Path, ...]
    retry_failed: bool


@dataclass(frozen=True)
class _Done:
    """A shard that is complete; whether it was written only now."""

    number: int
    planned: int
    failed: int
    written: bool


def build_shards(
    listing: Listing,
    output: Location,
    config: BuildConfig,
    options: BuildOptions | None = None,
    progress: Callable[[Plan], Progress] | None = None,
) -> Manifest | None:
    """Writes all samples of `listing` as shards to `output` and returns their manifest.

    Every sample is decoded and checked; what fails is counted and named in `failures.jsonl`. A
    build that was interrupted goes on when it is called again. Memory does not grow with the
    number of samples.

    Args:
        listing: what to write.
        output: folder or address of the shards; new, empty, or holding a build of the same (or,
            with `append`, any finished build).
        config: what decides the bytes.
        options: what does not.
        progress: called with each plan (more than one where `retry_failed` meets appended shards);
            what it returns is called with (samples done, samples failed) of each shard as it
            completes.

    Returns:
        The manifest; `None` where shards of other nodes are still to come.

    Raises:
        InputError: the folder holds something else, cannot be written or is being written to by
            another process, a folder of the source has vanished, too many samples failed, or not
            one could be used.
        OSError: writing failed, as on a full disk; nothing half-written stays.
    """
    options = options or BuildOptions()
    store = open_store(output)
    store.prepare()
    with _only_builder(store, options):
        record = open_record(store, {**listing.description, **_described(config)}, options)
        generations, written = [], set[int]()
        with _listed(listing, len(record.numbers)) as listing:
            for number in record.numbers:
                with closing(record.plan(number, listing, config)) as plan:
                    generations.append(record.begin(number, plan, listing.classes))
                    advance = _count_failures(plan, options, (progress or _silent)(plan))
                    written |= _write_missing(plan, store, config, listing, options, advance)
        return finish(store, record, generations, written, options.processes)


def _write_missing(
    plan: Plan,
    store: Store,
    config: BuildConfig,
    listing: Listing,
    options: BuildOptions,
    advance: Progress,
) -> set[int]:
    """Writes this node's shards of a plan that are not complete; their numbers."""
    store.clean(lambda name: _is_ours(name, options))
    if options.retry_failed:
        set_aside(store)
    written = set()
    try:
        tasks = _tasks(plan, store, config, listing, options)
        for done in run_tasks(_write_shard, tasks, _workers(plan, options)):
            advance(done.planned, done.failed)
            if done.written:
                written.add(done.number)
    finally:
        store.clean(lambda name: _is_ours(name, options))
    return written


@dataclass(frozen=True)
class _Spooled:
    """Entries of a listing in a file, for more than one pass."""

    file: IO[bytes]

    def __iter__(self) -> Iterator[Item | Failure]:
        self.file.seek(0)
        with suppress(EOFError):
            while True:
                yield pickle.load(self.file)


@contextmanager
def _listed(listing: Listing, passes: int) -> Iterator[Listing]:
    """A listing whose entries can be iterated so often; on disk, as they may be millions."""
    if passes == 1:
        yield listing
        return
    with tempfile.TemporaryFile(prefix="maskbank-list-") as file:
        for entry in listing.entries:
            pickle.dump(entry, file)
        yield replace(listing, entries=_Spooled(file))


def failure_counts(failures: Iterable[bytes]) -> dict[str, int]:
    """Reason -> number of samples, most frequent first, from the lines of `failures.jsonl`."""
    counts: Counter[str] = Counter()
    for line in failures:
        failure = json.loads(line)
        counts[f"{failure['stage']}: {failure['reason'].split(' (')[0]}"] += 1
    return dict(counts.most_common())


def _described(config: BuildConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@contextmanager
def _only_builder(store: Store, options: BuildOptions) -> Iterator[None]:
    """Keeps a second build out of a folder; nodes of one build share it."""
    if not isinstance(store, LocalStore):
        yield
    elif options.num_nodes == 1:
        with only_writer(store.root):
            yield
    else:
        own = store.root / f".node-{options.node_rank}-of-{options.num_nodes}"
        own.touch()
        with only_writer(store.root, shared=True), only_writer(own):
            yield
            own.unlink(missing_ok=True)


def _is_ours(name: str, options: BuildOptions) -> bool:
    """Whether a file is one that no other node writes."""
    if options.num_nodes == 1:
        return True
    number = name.removeprefix("shard-").partition(".")[0]
    return number.isdigit() and int(number) % options.num_nodes == options.node_rank


def _tasks(
    plan: Plan, store: Store, config: BuildConfig, listing: Listing, options: BuildOptions
) -> Iterator[_Task]:
    for shard in plan.planned_shards():
        if shard.number % options.num_nodes == options.node_rank:
            yield _Task(
                shard,
                plan.path,
                store,
                config,
                len(listing.classes) or None,
                listing.roots,
                options.retry_failed,
            )


def _workers(plan: Plan, options: BuildOptions) -> int:
    return max(1, min(options.processes, -(-plan.shards // options.num_nodes)))


def _silent(plan: Plan) -> Progress:
    return lambda done, failed: None


def _count_failures(plan: Plan, options: BuildOptions, advance: Progress) -> Progress:
    """Passes progress on, and ends the build where too much of it is failure."""
    limit = options.max_failures
    if limit is not None and 0 < limit < 1:
        limit = limit * (plan.samples + plan.unmatched)
    failed = plan.unmatched

    def count(done: int, more: int) -> None:
        nonlocal failed
        failed += more
        advance(done, more)
        if limit is not None and failed > limit:
            raise InputError(
                f"{failed:,} samples have failed, more than --max-failures allows; what is "
                "finished stays: look at the reasons in the newest shard-*.json and "
                "unmatched-*.jsonl, and run the same command again with a higher limit to go on"
            )

    count(0, 0)
    return count


# ---------------------------------------------------------------- in the workers


@lru_cache(maxsize=1)
def _open_plan(path: Path) -> PlanReader:
    return PlanReader(path)


def _write_shard(task: _Task) -> _Done:
    number = task.shard.number
    marker = _finished(task)
    written = marker is None
    if marker is None:
        items = _open_plan(task.plan).items(number)

        def fill(writer: ShardWriter) -> list[Failure]:
            return pack_all(items, task.config, task.num_classes, task.roots, writer.add)

        marker = write_shard(task.store, number, task.shard.fingerprint, fill)
    failed = sum(failure["stage"] != DUPLICATE for failure in marker["failures"])
    return _Done(number, task.shard.samples, failed, written)


def _finished(task: _Task) -> Marker | None:
    """The marker of a shard that is complete; `None` if it is to be written (again).

    That is also so where a file of it is lost, or a sample that failed can be used by now and was
    asked for. Lost records follow from the marker.
    """
    number = task.shard.number
    found = read_marker_bytes(task.store, number)
    if found is None:
        return None
    marker, data = found
    stem = shard_stem(number)
    if marker.get("plan") != task.shard.fingerprint:
        raise InputError(
            f"{task.store} holds {stem} of another build (other samples or options); "
            "give --output a new folder, or delete that one first"
        )
    items = dict(_open_plan(task.plan).items(number))
    for sample in marker["samples"]:
        if list(items[sample["key"]].sizes()) != sample["source_bytes"]:
            raise InputError(
                f"{task.store} holds {stem}, but files of {sample['source']} have changed since "
                "it was written; give --output a new folder, or delete that one first"
            )
    if is_whole(task.store, number, marker) and not _can_be_used_now(task, marker, items):
        if marker["samples"] and task.store.size(stem + RECORDS) < 0:
            write_records(task.store, number, marker, data)
        return marker
    task.store.remove(f"{stem}.json")  # first of all: killed after this, it counts as not written
    return None


def _can_be_used_now(task: _Task, marker: Marker, items: dict[str, Item]) -> bool:
    if not task.retry_failed:
        return False
    failed = [
        (failure["key"], items[failure["key"]])
        for failure in marker["failures"]
        if failure["stage"] != DUPLICATE
    ]
    packed: list[PackedSample] = []
    pack_all(
        failed,
        task.config,
        task.num_classes,
        task.roots,
        lambda sample, source, sizes: packed.append(sample),
    )
    return bool(packed)


def pack_all(
    items: Iterable[tuple[str, Item]],
    config: BuildConfig,
    num_classes: int | None,
    roots: tuple[Path, ...],
    add: Callable[[PackedSample, str, tuple[int, ...]], None],
) -> list[Failure]:
    """Packs samples one by one for `add`; returns those that cannot be used.

    Raises:
        InputError: one of `roots`, the folders that they come from, is gone.
    """
    failures, policy = [], config.policy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata that is not taken along
        for key, item in items:
            try:
                sample = pack_sample(key, item.source, item.read(), policy, num_classes)
            except SampleError as error:
                failures.append(Failure(key, item.source, error.stage, error.reason))
                _check_roots(roots)
            except OSError as error:
                failures.append(Failure(key, item.source, "read", str(error)))
                _check_roots(roots)
            else:
                add(sample, item.source, item.sizes())
    return failures


def _check_roots(roots: tuple[Path, ...]) -> None:
    """InputError if a whole folder of the source is gone: its samples are not to blame then."""
    for root in roots:
        try:
            with os.scandir(root) as entries:
                next(entries)
        except (OSError, StopIteration):
            raise InputError(
                f"{root}, which the samples come from, has vanished; bring it back and run the "
                "same command again to go on: finished shards are kept"
            ) from None
