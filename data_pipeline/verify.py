"""Checks shards against their manifest and indexes, and names everything that does not fit."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from data_pipeline.errors import InputError, SampleError
from data_pipeline.files import OpenFile, atomic_write, encode_json, read_bytes
from data_pipeline.index import ShardIndex, dali_index, member_name, read_index
from data_pipeline.manifest import FILE_NAME, Manifest, ShardEntry, read_manifest
from data_pipeline.records import SUFFIX as RECORDS
from data_pipeline.sample import LABEL, MASK
from data_pipeline.stored_sample import check_stored
from data_pipeline.tar_scan import Span, read_spans, scan_archive
from data_pipeline.workers import run_tasks

Level = Literal["fast", "hash", "decode"]
LEVELS: tuple[Level, ...] = get_args(Level)
SWAPPED = "it holds the bytes of"
_OURS = (".tar", ".idx", ".json", RECORDS)
_RECORDS_REMEDY = ": `maskbank shards records` writes it again"
_NOT_SHARDS = {FILE_NAME, "build.json"}


@dataclass(frozen=True)
class Problem:
    """Something that does not fit.

    Attributes:
        file: name of the file in the folder of shards.
        key: of the sample; empty where the file as a whole is meant.
        component: of the sample: image component, `mask.png`, …; or empty.
        what: is wrong.
    """

    file: str
    key: str
    component: str
    what: str

    def __str__(self) -> str:
        place = ".".join(filter(None, (self.key, self.component)))
        return ": ".join(filter(None, (self.file, place, self.what)))


@dataclass(frozen=True)
class ShardCheck:
    """What was found in one shard.

    Attributes:
        entry: of the manifest.
        problems: in the order of files and samples.
        bytes, sha256: of the tar as it is; -1 and empty where it is missing, or not read.
    """

    entry: ShardEntry
    problems: tuple[Problem, ...]
    bytes: int = -1
    sha256: str = ""


@dataclass(frozen=True)
class ShardTask:
    """A shard to check."""

    root: Path
    entry: ShardEntry
    level: Level
    num_classes: int | None


def verify_shards(
    root: Path,
    level: Level = "hash",
    processes: int = 1,
    progress: Callable[[ShardCheck], None] | None = None,
) -> list[Problem]:
    """Everything that is wrong with a folder of shards; samples in quarantine are known.

    Args:
        root: the folder.
        level: `fast` checks the manifest, sizes, indexes, and stray and missing files; `hash` reads
            everything, and checks SHA-256 of the shards, and CRC-32 and header of each component;
            `decode` also decodes every component and compares its size.
        processes: workers.
        progress: called with each shard that is done.

    Returns:
        Problems in the order of the manifest; empty if all is well.

    Raises:
        InputError: the folder holds no manifest.
    """
    if level not in LEVELS:
        raise InputError(f"the level is {level!r}; it can be {', '.join(LEVELS)}")
    if not (root / FILE_NAME).is_file():
        read_manifest(root)  # says so
    try:
        manifest = read_manifest(root, check_files=False)
    except InputError as error:
        return [Problem(FILE_NAME, "", "", str(error))]
    checks: dict[str, ShardCheck] = {}
    for check in run_tasks(check_shard, shard_tasks(manifest, level), processes):
        if check.problems:
            checks[check.entry.name] = check
        if progress is not None:
            progress(check)
    found = [*_manifest_problems(manifest)]
    for check in _name_swapped(manifest, checks):
        found.extend(check.problems)
    return [*found, *_stray_files(manifest)]


def shard_tasks(
    manifest: Manifest, level: Level, names: set[str] | None = None
) -> Iterator[ShardTask]:
    """The shards to check, all or those of some names."""
    for entry in manifest.shards:
        if names is None or entry.name in names:
            yield ShardTask(manifest.root, entry, level, len(manifest.classes) or None)


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        for problem in problems:
            file.write(encode_json(asdict(problem)) + b"\n")


def read_problems(path: Path) -> list[Problem]:
    """Reads what `write_problems` has written; InputError where a line is something else."""
    problems = []
    data = read_bytes(path, "list of problems", "make it with `maskbank shards verify --output`")
    for number, line in enumerate(data.splitlines(), 1):  # as text it splits at U+2028 too
        try:
            problem = Problem(**json.loads(line))
            if not all(isinstance(value, str) for value in asdict(problem).values()):
                raise TypeError("a value is no text")
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}, is no problem of `maskbank shards verify` ({error})"
            ) from None
        problems.append(problem)
    return problems


def check_shard(task: ShardTask) -> ShardCheck:
    """Checks one shard's four files against its entry in the manifest."""
    entry, path = task.entry, task.root / task.entry.name
    index, value, problems = _check_index(task)
    try:
        size = path.stat().st_size
    except OSError as error:
        problems.append(Problem(entry.name, "", "", f"cannot be read ({error.strerror})"))
        return ShardCheck(entry, tuple(problems))
    if size != entry.bytes:
        what = f"has {size:,} bytes, the manifest says {entry.bytes:,}"
        problems.append(Problem(entry.name, "", "", what))
    if task.level == "fast":
        return ShardCheck(entry, tuple(problems), size)
    samples = value["samples"] if index is not None else []
    spans = [_spans(sample) for sample in samples]
    try:
        scanned = scan_archive(path, (span for each in spans for span in each.values()))
    except OSError as error:
        problems.append(Problem(entry.name, "", "", f"cannot be read ({error.strerror})"))
        return ShardCheck(entry, tuple(problems), size)
    if scanned.sha256 != entry.sha256 and size == entry.bytes:
        what = "a part of it cannot be read" if not scanned.sha256 else "its SHA-256 differs"
        problems.append(Problem(entry.name, "", "", what))
    for number, (sample, found) in enumerate(zip(samples, spans, strict=True)):
        bad = list(_check_spans(entry, sample, found))
        if task.level == "decode" and not bad and index is not None:
            bad = list(_check_decoded(task, index, number, sample))
        problems.extend(bad)
    return ShardCheck(entry, tuple(problems), scanned.bytes, scanned.sha256)


# ---------------------------------------------------------------- one shard


def _check_index(task: ShardTask) -> tuple[ShardIndex | None, dict[str, Any], list[Problem]]:
    entry = task.entry
    try:
        index, value = read_index(task.root, entry)
        expected = dali_index(value["samples"])
    except InputError as error:
        return None, {}, [Problem(entry.index, "", "", str(error))]
    problems = []
    for name, slot, count in (("mask", MASK, entry.masks), ("label", LABEL, entry.labels)):
        held = sum(slot in sample["components"] for sample in value["samples"])
        if held != count:
            what = f"{held:,} samples have a {name}, the manifest says {count:,}"
            problems.append(Problem(entry.index, "", slot, what))
    if len(set(index.keys)) < len(index.keys):
        problems.append(Problem(entry.index, "", "", "two samples have one key"))
    derived = {f"{entry.stem}.idx": (expected, "")}
    derived[entry.records] = (index.encode_records(entry.index_sha256), _RECORDS_REMEDY)
    for name, (data, remedy) in derived.items():
        try:
            if OpenFile(task.root / name).read() != data:
                problems.append(Problem(name, "", "", f"is not what {entry.index} gives{remedy}"))
        except OSError as error:
            what = f"cannot be read ({error.strerror}){remedy}"
            problems.append(Problem(name, "", "", what))
    return index, value, problems


def _spans(sample: dict[str, Any]) -> dict[str, Span]:
    return {name: Span(extent[0], extent[1]) for name, extent in sample["components"].items()}


def _check_spans(
    entry: ShardEntry, sample: dict[str, Any], spans: dict[str, Span]
) -> Iterator[Problem]:
    for name, span in spans.items():
        if span.broken:
            what: str | None = "cannot be read"
        elif span.seen < span.size or len(span.header) < min(span.offset, 512):
            what = "the shard is cut short"
        elif span.crc != sample["components"][name][2]:
            what = "the checksum differs"
        else:
            what = span.header_problem(member_name(sample, name))
        if what is not None:
            yield Problem(entry.name, sample["key"], name, what)


def _check_decoded(
    task: ShardTask, index: ShardIndex, number: int, sample: dict[str, Any]
) -> Iterator[Problem]:
    extents = {name: (extent[0], extent[1]) for name, extent in sample["components"].items()}
    try:
        components = read_spans(task.root / task.entry.name, extents)
        found = check_stored(components, task.num_classes)
    except SampleError as error:
        names = {"image": index.image_names[number], "mask": MASK, "label": LABEL}
        name = names.get(error.stage, error.stage)
        yield Problem(task.entry.name, sample["key"], name, error.reason)
        return
    except (OSError, InputError) as error:
        yield Problem(task.entry.name, sample["key"], "", f"cannot be read ({error})")
        return
    expected = (index.image_names[number], *index.sizes[number].tolist())
    if (found.image, found.height, found.width) != expected:
        what = f"is {found.image} {found.width}×{found.height}, the index says {expected[0]} "
        what += f"{expected[2]}×{expected[1]}"
        yield Problem(task.entry.name, sample["key"], expected[0], what)
    elif MASK in components and found.proposals != sample.get("proposals", found.proposals):
        what = f"has {found.proposals} proposals, the index says {sample['proposals']}"
        yield Problem(task.entry.name, sample["key"], MASK, what)


# ---------------------------------------------------------------- the whole folder


def _manifest_problems(manifest: Manifest) -> Iterator[Problem]:
    """A manifest that holds a checksum is also compared byte by byte with what would be written."""
    data = (manifest.root / FILE_NAME).read_bytes()
    value = json.loads(data)
    older = "sha256" not in value and not any("index" in shard for shard in value["shards"])
    if not older and data != manifest.encode():
        yield Problem(FILE_NAME, "", "", "was edited: its bytes are not those that were written")


def _name_swapped(manifest: Manifest, checks: dict[str, ShardCheck]) -> Iterator[ShardCheck]:
    """Says of a shard that holds another one's bytes whose they are."""
    changed = [check for check in checks.values() if check.sha256 not in ("", check.entry.sha256)]
    owners = {entry.sha256: entry.name for entry in manifest.shards} if changed else {}
    for entry in manifest.shards:
        check = checks.get(entry.name)
        if check is None:
            continue
        owner = owners.get(check.sha256, entry.name)
        if owner != entry.name:
            told = Problem(entry.name, "", "", f"{SWAPPED} {owner}: rename it back")
            check = replace(check, problems=(told, *check.problems))
        yield check


def _stray_files(manifest: Manifest) -> Iterator[Problem]:
    entries = [*manifest.shards, *(shard.entry for shard in manifest.dropped)]
    stems = {entry.stem for entry in entries}
    indexes = {entry.index for entry in entries}
    with os.scandir(manifest.root) as found:
        names = sorted(each.name for each in found if _is_stray(each.name, stems, indexes))
    for name in names:
        if not _is_empty_shard(manifest.root, name):
            yield Problem(name, "", "", "is not in the manifest: remove it, or reindex the folder")


def _is_stray(name: str, stems: set[str], indexes: set[str]) -> bool:
    if not name.endswith(_OURS) or name.startswith(".") or name in _NOT_SHARDS | indexes:
        return False
    stem = name.rpartition(".")[0]
    quarantined = name.endswith((".json", RECORDS)) and stem.rpartition(".quarantine-")[0] in stems
    return stem not in stems and not quarantined


def _is_empty_shard(root: Path, name: str) -> bool:
    """Whether a file belongs to a shard of which not one sample could be used."""
    try:
        value = json.loads((root / (name.rpartition(".")[0] + ".json")).read_bytes())
        return isinstance(value, dict) and value.get("samples") == []
    except (OSError, ValueError, RecursionError):
        return False
