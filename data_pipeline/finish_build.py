"""The end of a build: duplicates out, failures gathered, the manifest written last."""

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data_pipeline.build_record import BuildRecord, Generation
from data_pipeline.errors import InputError
from data_pipeline.files import FolderInUse, encode_json, only_writer
from data_pipeline.manifest import (
    FAILURES,
    FILE_NAME,
    DroppedShard,
    Manifest,
    ShardEntry,
    hash_file,
    read_manifest,
)
from data_pipeline.sample import INFO
from data_pipeline.scratch import scratch_database
from data_pipeline.shard_file import (
    DUPLICATE,
    Marker,
    ShardWriter,
    read_components,
    read_marker_bytes,
    shard_entry,
    shard_stem,
    write_shard,
)
from data_pipeline.sources.item import Failure
from data_pipeline.store import LocalStore, Store
from data_pipeline.workers import run_tasks

BEFORE = "manifest.before.json"
_SAMPLES = "CREATE TABLE sample (content BLOB, earlier INTEGER, key TEXT, shard INTEGER)"


@dataclass(frozen=True)
class _Quarantined:
    """A shard of which samples are in quarantine; its place if all of them are."""

    entry: ShardEntry
    place: int | None

    def whole(self) -> list[DroppedShard]:
        return [] if self.place is None else [DroppedShard(self.place, self.entry)]


@dataclass(frozen=True)
class _Loss:
    """A shard that loses duplicates: key -> key of the sample that stays."""

    store: Store
    number: int
    duplicates: dict[str, str]


def finish(
    store: Store,
    record: BuildRecord,
    current: Sequence[Generation],
    written: set[int],
    processes: int,
) -> Manifest | None:
    """Completes the folder if all shards are there; `None` if some of other nodes are not.

    Args:
        store: the folder.
        record: its generations.
        current: those that this run has written.
        written: numbers of shards that this run has written or written again.
        processes: workers.

    Raises:
        InputError: not one sample could be used.
    """
    numbers = [number for generation in record.generations for number in generation.numbers]
    names = store.names()
    if not names.issuperset(f"{shard_stem(number)}.json" for number in numbers):
        return None
    complete = record.finished == len(record.generations)
    if complete and not written and FILE_NAME in names:
        with _only_finisher(store):
            return read_manifest(str(store))
    with _only_finisher(store) as chosen:
        if not chosen:
            return None
        for generation in current:
            if generation.configuration.get("duplicates") == "drop":
                # later generations were built knowing of these
                so_far = [n for n in numbers if n < generation.first_shard + generation.shards]
                losses = list(_find_duplicates(store, so_far, generation))
                workers = min(processes, len(losses) or 1)
                written |= set(run_tasks(_drop_duplicates, losses, workers))
        entries: list[ShardEntry] = []
        dropped: list[DroppedShard] = []
        failures = 0
        before = _before(store)
        with store.writing(FAILURES) as file:
            for number, generation in enumerate(record.generations):
                plans = hashlib.sha256()
                for line in _unmatched(store, record, number):
                    file.write(line)
                    failures += 1
                for shard in generation.numbers:
                    marker, data = _marker_bytes(store, shard)
                    plans.update(bytes.fromhex(marker["plan"]))
                    for failure in marker["failures"]:
                        file.write(encode_json(failure) + b"\n")
                    failures += len(marker["failures"])
                    entry = shard_entry(shard, marker, data)
                    kept = before.get(f"{shard_stem(shard)}.tar")
                    if kept and shard not in written and _same(store, kept, marker):
                        entry = kept.entry if kept.place is None else None
                        dropped += kept.whole()
                    if entry is not None:
                        entries.append(entry)
                if plans.hexdigest() != generation.fingerprint:
                    raise InputError(
                        f"{store} holds shards of different builds, as of two that were started "
                        "at once with other options; delete the folder and build again"
                    )
        if not entries:
            raise InputError(_nothing_left(store, record, failures))
        manifest = _write_manifest(store, record, entries, dropped, failures)
        store.remove(BEFORE)
        return manifest


def set_aside(store: Store) -> None:
    """Takes the manifest away while shards are written again: no one reads the set meanwhile.

    What it says of quarantine is kept for `finish`.
    """
    if store.size(FILE_NAME) < 0:
        return
    with store.open(FILE_NAME) as old, store.writing(BEFORE) as file:
        file.write(old.read())
    store.remove(FILE_NAME)


def _write_manifest(
    store: Store,
    record: BuildRecord,
    entries: list[ShardEntry],
    dropped: list[DroppedShard],
    failures: int,
) -> Manifest:
    first, *others = record.generations
    configuration = dict(first.configuration)
    if others:
        configuration["appended"] = [other.configuration for other in others]
    root = store.root if isinstance(store, LocalStore) else Path()
    classes = tuple(first.classes)
    manifest = Manifest(root, tuple(entries), classes, failures, configuration, tuple(dropped))
    with store.writing(FILE_NAME) as file:
        file.write(manifest.encode())
    return manifest if isinstance(store, LocalStore) else read_manifest(str(store))


def _before(store: Store) -> dict[str, _Quarantined]:
    """Tar name -> what the manifest that is or was there had in quarantine."""
    name = FILE_NAME if store.size(FILE_NAME) >= 0 else BEFORE
    if not isinstance(store, LocalStore) or store.size(name) < 0:
        return {}
    manifest = read_manifest(store.root, check_files=False, name=name)
    found = [_Quarantined(entry, None) for entry in manifest.shards if entry.quarantined]
    found += [_Quarantined(shard.entry, shard.place) for shard in manifest.dropped]
    return {each.entry.name: each for each in found}


def _same(store: Store, quarantined: _Quarantined, marker: Marker) -> bool:
    """Whether a tar is what it was when its samples went into quarantine."""
    assert isinstance(store, LocalStore)
    try:
        found = hash_file(store.root / quarantined.entry.name)
    except OSError:
        return True
    return found != marker["sha256"] or found == quarantined.entry.sha256


def _marker(store: Store, number: int) -> Marker:
    return _marker_bytes(store, number)[0]


def _marker_bytes(store: Store, number: int) -> tuple[Marker, bytes]:
    found = read_marker_bytes(store, number)
    if found is None:
        raise InputError(f"{store}/{shard_stem(number)}.json has vanished; run the command again")
    return found


def _unmatched(store: Store, record: BuildRecord, number: int) -> Iterator[bytes]:
    """What a generation could not match; nothing where the same source was listed again later.

    The later listing names all that is still without a match.
    """
    generation, *later = record.generations[number:]
    if any(each.configuration == generation.configuration for each in later):
        return
    name = f"unmatched-{number:03d}.jsonl"
    if store.size(name) >= 0:
        with store.open(name) as file:
            yield from file


def _nothing_left(store: Store, record: BuildRecord, failures: int) -> str:
    """Frees the folder for another try, and says what was wrong."""
    with store.open(FAILURES) as file:
        first = file.readline()
    for generation in record.generations:
        for number in generation.numbers:
            store.remove(f"{shard_stem(number)}.json")
    store.remove("build.json")
    if not failures:
        return f"there is no sample to write to {store}; check the source's folders and lists"
    told = Failure(**json.loads(first))
    return (
        f"not one of {failures} samples could be used; the first, {told.source}: "
        f"{told.stage}: {told.reason}. All are in {store}/{FAILURES}"
    )


@contextmanager
def _only_finisher(store: Store) -> Iterator[bool]:
    """Whether no other node is finishing at this moment."""
    if not isinstance(store, LocalStore):
        yield True
        return
    lock = store.root / ".finish"
    lock.touch()
    try:
        with only_writer(lock):
            yield True
            for left in store.root.glob(".node-*-of-*"):  # of nodes that were killed
                left.unlink(missing_ok=True)
    except FolderInUse:
        yield False
    finally:
        lock.unlink(missing_ok=True)


# ---------------------------------------------------------------- duplicates


def _find_duplicates(store: Store, numbers: list[int], current: Generation) -> Iterator[_Loss]:
    """What each shard of the current generation loses.

    Of equal samples the one of the earliest generation stays, and in it the one of the first key.
    Sizes and CRC-32 of image, mask and label tell which may be equal; their bytes decide.
    """
    losses: dict[int, dict[str, str]] = {}
    with scratch_database(_SAMPLES) as database:
        for number in numbers:
            rows = _contents(_marker(store, number), number, number < current.first_shard)
            database.executemany("INSERT INTO sample VALUES (?, ?, ?, ?)", rows)
        database.execute("CREATE INDEX by_content ON sample (content)")
        same = database.execute(
            "SELECT content, key, shard FROM sample WHERE content IN "
            "(SELECT content FROM sample GROUP BY content HAVING count(*) > 1) "
            "ORDER BY content, earlier DESC, key"
        )
        for _, group in groupby(same, key=lambda row: row[0]):
            for key, shard, winner in _equal_ones(store, [row[1:] for row in group]):
                if shard >= current.first_shard:
                    losses.setdefault(shard, {})[key] = winner
    for number in sorted(losses):
        yield _Loss(store, number, losses[number])


def _contents(marker: Marker, number: int, earlier: bool) -> Iterator[tuple[bytes, int, str, int]]:
    for sample in marker["samples"]:
        content = b""
        for name, (_, size, crc) in sorted(sample["components"].items()):
            if name != INFO:
                content += name.encode() + struct.pack("<QI", size, crc)
        yield content, int(earlier), sample["key"], number


def _equal_ones(store: Store, candidates: list[tuple[str, int]]) -> Iterator[tuple[str, int, str]]:
    """(key, shard, key of the first that is equal) of those (key, shard) that are not the first."""
    firsts: list[tuple[str, dict[str, bytes]]] = []
    for key, shard in candidates:
        wanted = [each for each in _marker(store, shard)["samples"] if each["key"] == key]
        _, components = next(read_components(store, shard, wanted))
        data = {name: value for name, value in components.items() if name != INFO}
        winner = next((name for name, other in firsts if other == data), None)
        if winner is None:
            firsts.append((key, data))
        else:
            yield key, shard, winner


def _drop_duplicates(loss: _Loss) -> int:
    """Writes a shard again without some of its samples; what stays is copied."""
    marker = _marker(loss.store, loss.number)
    stay = [sample for sample in marker["samples"] if sample["key"] not in loss.duplicates]
    gone = [sample for sample in marker["samples"] if sample["key"] in loss.duplicates]
    failures = [Failure(**failure) for failure in marker["failures"]]
    failures += [
        Failure(
            sample["key"],
            sample["source"],
            DUPLICATE,
            f"the same image, mask and label as {loss.duplicates[sample['key']]}",
        )
        for sample in gone
    ]
    failures.sort(key=lambda failure: (failure.stage == DUPLICATE, failure.key))

    def copy(writer: ShardWriter) -> list[Failure]:
        for sample, components in read_components(loss.store, loss.number, stay):
            described: dict[str, Any] = {**sample}
            described.pop("components")
            writer.copy(described, components)
        return failures

    # without a marker first: killed in between, the shard is written anew from its source
    loss.store.remove(f"{shard_stem(loss.number)}.json")
    write_shard(loss.store, loss.number, marker["plan"], copy)
    return loss.number
