"""Takes bad samples out of the index of their shard, and puts them back; tars stay untouched.

A shard gets a new index beside the old one, then the manifest is switched to it in one rename, then
DALI's `.idx` follows. So a process that is killed at any moment leaves a set of shards that is
either as it was or as it is to be, but for an `.idx` or `.records`, which the next run mends.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write, encode_json, only_writer, read_bytes
from data_pipeline.index import dali_index, read_index
from data_pipeline.manifest import DroppedShard, Manifest, ShardEntry, read_manifest
from data_pipeline.reindex import describe_shard, index_value, member_names
from data_pipeline.tar_samples import MemberNames, scan_tar
from data_pipeline.verify import Problem, ShardCheck, ShardTask, check_shard, shard_tasks
from data_pipeline.workers import run_tasks
from data_pipeline.write_records import write_records

LOG = "quarantine.jsonl"
Value = dict[str, Any]
INDEX_NUMBER = re.compile(r"\.quarantine-(\d+)\.json$")


@dataclass(frozen=True)
class Outcome:
    """What was done.

    Attributes:
        manifest: as it is now.
        samples: taken out, or put back.
        dropped: shards of which nothing is left, or that were put back as a whole.
        indexes: made anew from their tars.
        left: what was not changed, and why.
    """

    manifest: Manifest
    samples: int = 0
    dropped: int = 0
    indexes: int = 0
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardWork:
    """A shard to look at again: what problems say of it, and what it is to be checked with."""

    check: ShardTask
    reasons: dict[str, str]
    names: MemberNames


@dataclass(frozen=True)
class Change:
    """A shard that changes: its new entry, whose index is written; without one it is dropped."""

    before: ShardEntry
    entry: ShardEntry | None
    bad: tuple[tuple[str, str], ...] = ()
    remade: bool = False


def quarantine_samples(
    root: Path,
    problems: Sequence[Problem],
    processes: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Takes the samples that problems name out of the set, and shards that cannot be read at all.

    Every shard that a problem is about is read again, so that what is decided fits what is there.
    An index that is damaged is made anew where its tar is still the one of the manifest.

    Args:
        root: the folder of shards.
        problems: of `verify_shards`.
        processes: workers.
        progress: called with the name of each shard that was read.

    Raises:
        InputError: nothing would be left, the manifest is damaged, or another process writes there.
    """
    with only_writer(root):
        manifest = read_manifest(root, check_files=False)
        reasons, left = _by_shard(manifest, problems)
        names = member_names(manifest.configuration)
        tasks = (
            ShardWork(task, reasons[task.entry.name], names)
            for task in shard_tasks(manifest, "hash", set(reasons))
        )
        changes: dict[str, Change] = {}
        stale: list[ShardEntry] = []
        for entry, change in run_tasks(_plan_change, tasks, processes):
            if change is None:
                stale.append(entry)
            else:
                changes[entry.name] = change
            if progress is not None:
                progress(entry.name)
        if changes:
            manifest = _switch(manifest, changes)
        kept = {entry.name: entry for entry in manifest.shards}
        for entry in [*stale, *(kept[name] for name in changes if name in kept)]:
            write_derived(root, entry)
    return Outcome(
        manifest,
        sum(
            change.before.samples - (change.entry.samples if change.entry else 0)
            for change in changes.values()
        ),
        sum(change.entry is None for change in changes.values()),
        sum(change.remade for change in changes.values()),
        tuple(left),
    )


# ---------------------------------------------------------------- one shard, in a worker


def _plan_change(task: ShardWork) -> tuple[ShardEntry, Change | None]:
    """What becomes of a shard; `None` where at most `.idx` or `.records` are wrong."""
    entry, root = task.check.entry, task.check.root
    check = check_shard(task.check)
    try:
        value, remade = read_index(root, entry)[1], False
    except InputError as error:
        found = index_from_tar(task, check.sha256)
        if found is None:
            return entry, Change(entry, None, (("", str(error)),))
        value, remade = found, True
    if not check.sha256:
        return entry, Change(entry, None, _all_bad(value["samples"], check))
    reasons = {**task.reasons, **_reasons(check)}
    keys = {sample["key"]: reasons.get(sample["key"], "") for sample in value["samples"]}
    bad = tuple((key, what) for key, what in keys.items() if key in reasons)
    if len(bad) == len(keys):
        return entry, Change(entry, None, bad)
    if not bad and not remade and check.sha256 == entry.sha256 and _counts_hold(entry, value):
        return entry, None
    reduced = {**value, "bytes": check.bytes, "sha256": check.sha256}
    reduced["samples"] = [each for each in value["samples"] if each["key"] not in reasons]
    reduced["quarantined"] = value.get("quarantined", []) + [
        {"place": place, "what": keys[sample["key"]], "sample": sample}
        for place, sample in _with_places(value)
        if sample["key"] in reasons
    ]
    reduced["original"] = value.get("original", asdict(entry))
    return entry, with_new_index(root, entry, reduced, bad, remade)


def index_from_tar(work: ShardWork, tar_sha256: str) -> Value | None:
    """The index of a tar that is still the one of the manifest, made anew; else `None`.

    Only where nothing of it was in quarantine: what was bad once may well decode.
    """
    entry, root = work.check.entry, work.check.root
    if tar_sha256 != entry.sha256 or entry.quarantined:
        return None
    value = index_value(scan_tar(root / entry.name, work.names, work.check.num_classes))
    remade, _ = describe_shard(entry.name, value)
    counts = (remade.samples, remade.masks, remade.labels, remade.sha256)
    return value if counts == (entry.samples, entry.masks, entry.labels, entry.sha256) else None


def with_new_index(
    root: Path,
    entry: ShardEntry,
    value: Value,
    bad: tuple[tuple[str, str], ...] = (),
    remade: bool = False,
) -> Change:
    """Writes a new index beside those that are there, unless it is there already."""
    data = encode_json(value) + b"\n"
    used = INDEX_NUMBER.search(entry.index)
    number = 1 + (int(used[1]) if used else 0)
    while (path := root / f"{entry.stem}.quarantine-{number}.json").exists():
        if path.read_bytes() == data:
            break
        number += 1
    quarantined = len(value.get("quarantined", []))
    described, _ = describe_shard(entry.name, value, path.name, quarantined)
    if not path.exists():
        with atomic_write(path) as file:
            file.write(data)
    write_records(root, described)
    return Change(entry, described, bad, remade)


def _counts_hold(entry: ShardEntry, value: Value) -> bool:
    found, _ = describe_shard(entry.name, value)
    return (found.masks, found.labels) == (entry.masks, entry.labels)


def _with_places(value: Value) -> list[tuple[int, Value]]:
    """Samples of an index with their places among all samples of the tar."""
    taken = {int(out["place"]) for out in value.get("quarantined", [])}
    total = len(value["samples"]) + len(taken)
    places = [place for place in range(total) if place not in taken]
    return list(zip(places, value["samples"], strict=True))


def _reasons(check: ShardCheck) -> dict[str, str]:
    return {
        problem.key: f"{problem.component}: {problem.what}"
        for problem in reversed(check.problems)
        if problem.key
    }


def _all_bad(samples: list[Value], check: ShardCheck) -> tuple[tuple[str, str], ...]:
    what = next((each.what for each in check.problems if each.file == check.entry.name), "")
    return tuple((sample["key"], what) for sample in samples)


# ---------------------------------------------------------------- the whole folder


def _by_shard(
    manifest: Manifest, problems: Iterable[Problem]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Tar name -> key -> reason of all that problems are about; and what no shard owns."""
    owners: dict[str, str] = {}
    for entry in manifest.shards:
        owners |= dict.fromkeys(_files(entry), entry.name)
    found: dict[str, dict[str, str]] = {}
    left = []
    for problem in problems:
        owner = owners.get(problem.file)
        if owner is None:
            left.append(str(problem))
            continue
        reasons = found.setdefault(owner, {})
        if problem.key:
            reasons.setdefault(problem.key, f"{problem.component}: {problem.what}")
    return found, left


def _files(entry: ShardEntry) -> tuple[str, ...]:
    return entry.name, entry.index, entry.records, f"{entry.stem}.idx"


def _switch(manifest: Manifest, changes: dict[str, Change]) -> Manifest:
    """The log first, then the manifest: before that rename nothing has changed."""
    gone = {name for name, change in changes.items() if change.entry is None}
    entries = [
        entry if (change := changes.get(entry.name)) is None else change.entry
        for entry in manifest.shards
    ]
    kept = tuple(entry for entry in entries if entry is not None)
    if not kept:
        raise InputError(
            f"not one sample of {manifest.root} would be left; nothing was changed: "
            "copy the shards here again or build them again"
        )
    lines = []
    for name, change in sorted(changes.items()):
        for key, what in change.bad:
            index = change.entry.index if change.entry else ""
            lines.append({"shard": name, "key": key, "index": index, "what": what})
        if change.remade:
            what = "its index was damaged or lost, and was made anew"
            lines.append(
                {
                    "shard": name,
                    "key": "",
                    "index": change.entry.index if change.entry else "",
                    "what": what,
                }
            )
    _log(manifest.root, lines)
    places = places_of(manifest)
    dropped = [
        DroppedShard(places[name], _original_entry(manifest.root, changes[name].before))
        for name in gone
    ]
    every = sorted([*manifest.dropped, *dropped], key=lambda shard: shard.place)
    changed = replace(manifest, shards=kept, dropped=tuple(every))
    changed.write()
    return changed


def places_of(manifest: Manifest) -> dict[str, int]:
    """Tar name -> place among all shards, those that were dropped included."""
    taken = {shard.place for shard in manifest.dropped}
    total = len(manifest.shards) + len(taken)
    free = (place for place in range(total) if place not in taken)
    return {entry.name: place for entry, place in zip(manifest.shards, free, strict=True)}


def _original_entry(root: Path, entry: ShardEntry) -> ShardEntry:
    """What a shard was before any quarantine, as far as its index says so."""
    if ".quarantine-" not in entry.index:
        return entry
    try:
        return ShardEntry(**read_index(root, entry)[1]["original"])
    except (InputError, KeyError, TypeError):
        return entry


def _log(root: Path, lines: list[Value]) -> None:
    """Adds lines that are not there yet: a run that was killed and started again says it once."""
    path = root / LOG
    before = read_bytes(path, "log", "remove it") if path.exists() else b""
    known = before.splitlines()
    new = [line for each in lines if (line := encode_json(each)) not in set(known)]
    with atomic_write(path) as file:
        for line in [*known, *new]:
            file.write(line + b"\n")


def write_derived(root: Path, entry: ShardEntry) -> None:
    """Writes what follows from a shard's index, where it is not there as it should be."""
    index, value = read_index(root, entry)
    expected = {
        f"{entry.stem}.idx": dali_index(value["samples"]),
        entry.records: index.encode_records(entry.index_sha256),
    }
    for name, data in expected.items():
        path = root / name
        if not path.is_file() or path.read_bytes() != data:
            with atomic_write(path) as file:
                file.write(data)


def read_log(root: Path) -> list[Value]:
    """Lines of the log: shard, key, index and what was wrong."""
    path = root / LOG
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
