"""Makes indexes and a manifest for tars that have none, so that training reads them in place."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write, encode_json, only_writer, read_json
from data_pipeline.index import INDEX_VERSION, dali_index, parse_samples
from data_pipeline.manifest import FAILURES, FILE_NAME, SHARD_NAME, Manifest, ShardEntry
from data_pipeline.sample import LABEL, MASK
from data_pipeline.sources.item import Failure
from data_pipeline.tar_samples import MemberNames, TarSamples, scan_tar
from data_pipeline.workers import run_tasks

ADVICE = "`maskbank shards build webdataset` writes them again in the form that is read"


@dataclass(frozen=True)
class ReindexTask:
    """A tar to index."""

    root: Path
    name: str
    names: MemberNames
    num_classes: int | None
    labels: bool


@dataclass(frozen=True)
class Indexed:
    """A tar that has its index; `entry` is `None` where no sample of it can be read."""

    name: str
    entry: ShardEntry | None
    failures: tuple[Failure, ...]
    dropped_labels: int


@dataclass(frozen=True)
class Reindexed:
    """What came of it.

    Attributes:
        manifest: as written.
        failures: samples that cannot be read in place; all are in `failures.jsonl`.
        dropped_labels: labels left out, since no one says what their classes are.
    """

    manifest: Manifest
    failures: int
    dropped_labels: int


def reindex_tars(
    root: Path,
    names: MemberNames | None = None,
    classes: tuple[str, ...] = (),
    force: bool = False,
    processes: int = 1,
    progress: Callable[[Indexed], None] | None = None,
) -> Reindexed:
    """Writes the indexes of every tar in a folder, and `manifest.json`; tars stay untouched.

    Samples are taken where they are in the form of sample.py already; others are listed in
    `failures.jsonl`. Classes are those of the manifest that was there, unless given.

    Args:
        root: the folder.
        names: what the tars call masks and labels.
        classes: names of label classes, background first; without any, labels are left out.
        force: makes a manifest that is there anew.
        processes: workers.
        progress: called with each tar that is done.

    Raises:
        InputError: no tar, one with a name that cannot be, a manifest that is there already, or not
            one sample that can be read.
    """
    names = names or MemberNames()
    if not root.is_dir():
        raise InputError(f"{root} is no folder; give the one that holds the tars")
    tars = _list_tars(root)
    if (root / FILE_NAME).exists() and not force:
        raise InputError(
            f"{root} has a {FILE_NAME}; check it with `maskbank shards verify`, or make it and all "
            "indexes anew with --force"
        )
    classes = classes or _former_classes(root)
    with only_writer(root):
        tasks = (ReindexTask(root, tar, names, len(classes) or None, bool(classes)) for tar in tars)
        done: dict[str, Indexed] = {}
        for indexed in run_tasks(_index_tar, tasks, processes):
            done[indexed.name] = indexed
            if progress is not None:
                progress(indexed)
        failures = [failure for tar in tars for failure in done[tar].failures]
        with atomic_write(root / FAILURES) as file:
            for failure in failures:
                file.write(encode_json(asdict(failure)) + b"\n")
        entries = tuple(entry for tar in tars if (entry := done[tar].entry) is not None)
        if not entries:
            raise InputError(_nothing(root, failures))
        configuration = {"source": "reindex", "mask_ext": names.mask, "label_ext": names.label}
        manifest = Manifest(root, entries, classes, len(failures), configuration)
        manifest.write()
    dropped = sum(indexed.dropped_labels for indexed in done.values())
    return Reindexed(manifest, len(failures), dropped)


def member_names(configuration: dict[str, Any]) -> MemberNames:
    """What the tars of a manifest call masks and labels."""
    ours = MemberNames()
    return MemberNames(
        str(configuration.get("mask_ext", ours.mask)),
        str(configuration.get("label_ext", ours.label)),
    )


def index_value(found: TarSamples) -> dict[str, Any]:
    """The JSON of an index of what a tar holds."""
    return {
        "version": INDEX_VERSION,
        "plan": "",
        "sha256": found.sha256,
        "bytes": found.bytes,
        "failures": [asdict(failure) for failure in found.failures],
        "samples": found.samples,
    }


def describe_shard(
    name: str, value: dict[str, Any], index: str = "", quarantined: int = 0
) -> tuple[ShardEntry, bytes]:
    """The manifest's entry of a shard whose index is `value`, and the index file's bytes."""
    data = encode_json(value) + b"\n"
    samples = value["samples"]
    entry = ShardEntry(
        name=name,
        samples=len(samples),
        masks=sum(MASK in sample["components"] for sample in samples),
        labels=sum(LABEL in sample["components"] for sample in samples),
        bytes=value["bytes"],
        sha256=value["sha256"],
        index_sha256=hashlib.sha256(data).hexdigest(),
        index=index,
        quarantined=quarantined,
    )
    return entry, data


def _list_tars(root: Path) -> list[str]:
    tars = sorted(path.name for path in root.iterdir() if path.name.endswith(".tar"))
    if not tars:
        raise InputError(f"{root} holds no tar; give the folder that directly holds them")
    for name in tars:
        if not SHARD_NAME.fullmatch(name):
            raise InputError(
                f"{root / name}: a shard's name has letters, digits, _, - and . only; rename it"
            )
    return tars


def _former_classes(root: Path) -> tuple[str, ...]:
    try:
        classes = read_json(root / FILE_NAME, "manifest")["classes"]
    except (InputError, KeyError):
        return ()
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return tuple(classes) if named else ()


def _index_tar(task: ReindexTask) -> Indexed:
    path = task.root / task.name
    try:
        found = scan_tar(path, task.names, task.num_classes)
    except OSError as error:
        failure = Failure("", task.name, "read", f"cannot be read ({error.strerror})")
        return Indexed(task.name, None, (failure,), 0)
    dropped = 0 if task.labels else _drop_labels(found.samples)
    entry, data = describe_shard(task.name, index_value(found))
    stem = task.root / entry.stem
    if found.samples:
        with atomic_write(stem.with_name(f"{entry.stem}.idx")) as file:
            file.write(dali_index(found.samples))
        index = parse_samples(found.samples, found.bytes)
        with atomic_write(task.root / entry.records) as file:
            file.write(index.encode_records(entry.index_sha256))
    with atomic_write(stem.with_name(entry.index)) as file:
        file.write(data)
    kept = entry if found.samples else None
    return Indexed(task.name, kept, tuple(found.failures), dropped)


def _drop_labels(samples: list[dict[str, Any]]) -> int:
    for sample in samples:
        sample.get("members", {}).pop(LABEL, None)
    return sum(sample["components"].pop(LABEL, None) is not None for sample in samples)


def _nothing(root: Path, failures: list[Failure]) -> str:
    if not failures:
        return f"the tars in {root} hold no image; check --mask-ext and --label-ext"
    first = failures[0]
    return (
        f"not one sample in {root} can be read in place; the first, {first.source}: "
        f"{first.stage}: {first.reason}. All are in {root / FAILURES}; {ADVICE}"
    )
