"""Puts back what `quarantine.py` has taken out, where tars are again what they were."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write, encode_json, only_writer
from data_pipeline.index import read_index
from data_pipeline.manifest import Manifest, ShardEntry, hash_file, read_manifest
from data_pipeline.quarantine import (
    Change,
    Outcome,
    ShardWork,
    Value,
    index_from_tar,
    places_of,
    with_new_index,
    write_derived,
)
from data_pipeline.reindex import member_names
from data_pipeline.verify import ShardTask
from data_pipeline.workers import run_tasks


def restore_samples(
    root: Path, processes: int = 1, progress: Callable[[str], None] | None = None
) -> Outcome:
    """Puts back what was taken out, shard by shard, where the tar is again what it was.

    Raises:
        InputError: the manifest is damaged, or another process writes there.
    """
    with only_writer(root):
        manifest = read_manifest(root, check_files=False)
        names = member_names(manifest.configuration)
        candidates = [entry for entry in manifest.shards if ".quarantine-" in entry.index]
        whole = [shard.entry for shard in manifest.dropped]
        tasks = [
            ShardWork(ShardTask(root, entry, "hash", len(manifest.classes) or None), {}, names)
            for entry in [*candidates, *whole]
        ]
        restored: dict[str, Change] = {}
        left = []
        for entry, change, why in run_tasks(_plan_restore, tasks, processes):
            if change is not None:
                restored[entry.name] = change
            elif why:
                left.append(f"{entry.name}: {why}")
            if progress is not None:
                progress(entry.name)
        before = sum(
            change.before.samples for change in restored.values() if change.before not in whole
        )
        if restored:
            manifest = _put_back(manifest, restored)
        for entry in manifest.shards:
            if entry.name in restored:
                write_derived(root, entry)
    now = sum(entry.samples for entry in manifest.shards if entry.name in restored)
    back = sum(entry.name in restored for entry in whole)
    return Outcome(manifest, now - before, back, 0, tuple(sorted(left)))


def _plan_restore(task: ShardWork) -> tuple[ShardEntry, Change | None, str]:
    """What a shard was, if its tar is that again; else why not."""
    entry, root = task.check.entry, task.check.root
    try:
        tar_sha256 = hash_file(root / entry.name)
    except OSError as error:
        return entry, None, f"cannot be read ({error.strerror})"
    if ".quarantine-" not in entry.index:
        original, data = entry, b""
    else:
        try:
            value = read_index(root, entry)[1]
            original = ShardEntry(**value["original"])
        except (InputError, KeyError, TypeError) as error:
            return entry, None, str(error)
        data = _original_index(value, original)
        if not data and not value.get("quarantined") and tar_sha256 == original.sha256:
            return entry, None, ""  # only its index was made anew, and that one is good
    if tar_sha256 != original.sha256:
        return entry, None, "its bytes are not again those that were written"
    if _is_there(root, original):
        return entry, Change(entry, original), ""
    if data:  # the manifest names this file only once it is whole
        with atomic_write(root / original.index) as file:
            file.write(data)
        return entry, Change(entry, original), ""
    work = replace(task, check=replace(task.check, entry=original))
    remade = index_from_tar(work, tar_sha256)
    if remade is None:
        return entry, None, f"{original.index} is lost or damaged"
    return entry, with_new_index(root, entry, {**remade, "original": asdict(original)}), ""


def _original_index(value: Value, original: ShardEntry) -> bytes:
    """The bytes of the index before any quarantine, put together again; empty if that fails."""
    samples = list(value["samples"])
    for out in sorted(value.get("quarantined", []), key=lambda each: int(each["place"])):
        samples.insert(out["place"], out["sample"])
    former = {name: part for name, part in value.items() if name not in ("quarantined", "original")}
    former |= {"samples": samples, "bytes": original.bytes, "sha256": original.sha256}
    data = encode_json(former) + b"\n"
    return data if hashlib.sha256(data).hexdigest() == original.index_sha256 else b""


def _is_there(root: Path, original: ShardEntry) -> bool:
    try:
        return hash_file(root / original.index) == original.index_sha256
    except OSError:
        return False


def _put_back(manifest: Manifest, restored: dict[str, Change]) -> Manifest:
    places = places_of(manifest)
    entries = [(places[entry.name], entry) for entry in manifest.shards]
    entries += [
        (shard.place, shard.entry) for shard in manifest.dropped if shard.entry.name in restored
    ]
    kept = []
    for _, entry in sorted(entries, key=lambda each: each[0]):
        change = restored.get(entry.name)
        if change is None or change.entry is None:
            kept.append(entry)
            continue
        kept.append(change.entry)
    dropped = tuple(shard for shard in manifest.dropped if shard.entry.name not in restored)
    changed = replace(manifest, shards=tuple(kept), dropped=dropped)
    changed.write()
    return changed
