"""Writes shards: a fixed plan, filled by several processes, byte for byte the same for any number.

A shard is `shard-N.tar`, then `shard-N.idx`, then `shard-N.json`, each written aside, synced and
renamed; the JSON is the commit marker, so a build that was killed goes on where it stopped.
"""

import errno
import hashlib
import io
import json
import multiprocessing
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline.errors import InputError, SampleError
from data_pipeline.files import atomic_write, read_json, sync_directory, write_json
from data_pipeline.index import INDEX_VERSION
from data_pipeline.manifest import FILE_NAME, Manifest, ShardEntry
from data_pipeline.sample import LABEL, MASK, MaskMode, PackedSample, pack_sample
from data_pipeline.sources.item import Failure, Item, Listing

FAILURES = "failures.jsonl"
_TAR_BLOCK = 512


@dataclass(frozen=True)
class BuildConfig:
    """What decides the bytes of the shards.

    Attributes:
        samples_per_shard: planned samples a shard; those that fail make it smaller.
        mask_mode: how mask values are read, see `sample.decode_mask`.
        shuffle_seed: the samples are shuffled once over all shards; negative keeps key order.
    """

    samples_per_shard: int = 1000
    mask_mode: MaskMode = "auto"
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise InputError(f"samples per shard is {self.samples_per_shard}; need at least 1")


@dataclass(frozen=True)
class _Task:
    """One planned shard."""

    number: int
    items: tuple[Item, ...]
    output: Path
    mask_mode: MaskMode
    num_classes: int | None
    fingerprint: str


@dataclass(frozen=True)
class _Written:
    """A shard that is complete on disk; `entry` is None where no sample of it survived."""

    number: int
    entry: ShardEntry | None
    failures: tuple[Failure, ...]
    planned: int


def build_shards(
    listing: Listing,
    output: Path,
    config: BuildConfig,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Writes all samples of `listing` as shards below `output` and returns their manifest.

    Every sample is decoded and checked; what fails is counted and named in `failures.jsonl`.

    Args:
        listing: what to write.
        output: folder of the shards; new, empty, or holding an interrupted build of the same.
        config: what decides the bytes.
        processes: worker processes; the result does not depend on them.
        progress: called with (samples done, samples failed) of each shard as it completes.

    Raises:
        InputError: the folder holds something else, or not one sample could be used.
        OSError: writing failed, as on a full disk; nothing half-written stays.
    """
    tasks = list(_plan(listing, output, config))
    _prepare_output(output, tasks)
    written = sorted(
        _run(tasks, processes, progress or (lambda done, failed: None)),
        key=lambda shard: shard.number,
    )
    failures = [*listing.failures, *(failure for shard in written for failure in shard.failures)]
    _write_failures(output, failures)
    entries = tuple(shard.entry for shard in written if shard.entry is not None)
    if not entries:
        raise InputError(_nothing_left(output, failures))
    described = {**listing.description, **asdict(config)}
    manifest = Manifest(output, entries, listing.classes, len(failures), described)
    manifest.write()
    return manifest


def failure_counts(output: Path) -> dict[str, int]:
    """Reason -> number of samples, most frequent first, from `failures.jsonl`."""
    counts: Counter[str] = Counter()
    for line in (output / FAILURES).read_text(encoding="utf-8").splitlines():
        failure = json.loads(line)
        counts[f"{failure['stage']}: {failure['reason'].split(' (')[0]}"] += 1
    return dict(counts.most_common())


def _plan(listing: Listing, output: Path, config: BuildConfig) -> Iterator[_Task]:
    items = list(listing.items)
    if config.shuffle_seed >= 0:
        generator = np.random.Generator(np.random.Philox(key=config.shuffle_seed))
        items = [items[position] for position in generator.permutation(len(items))]
    num_classes = len(listing.classes) or None
    for number, start in enumerate(range(0, len(items), config.samples_per_shard)):
        part = tuple(items[start : start + config.samples_per_shard])
        identity = [[item.key, item.source] for item in part]
        what = json.dumps([INDEX_VERSION, asdict(config), listing.classes, identity])
        fingerprint = hashlib.sha256(what.encode()).hexdigest()
        yield _Task(number, part, output, config.mask_mode, num_classes, fingerprint)


def _prepare_output(output: Path, tasks: Sequence[_Task]) -> None:
    """Accepts a new or empty folder, or one that holds only shards of this very plan."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in output.iterdir()}
    except OSError as error:
        raise InputError(f"{output} cannot be used as output ({error.strerror})") from None
    for leftover in [name for name in names if name.startswith(".") and name.endswith(".tmp")]:
        (output / leftover).unlink(missing_ok=True)
        names.discard(leftover)
    expected = {FILE_NAME, FAILURES}
    for task in tasks:
        stem = _stem(task.number)
        expected |= {f"{stem}.tar", f"{stem}.idx", f"{stem}.json"}
        if f"{stem}.json" not in names:
            continue
        if read_json(output / f"{stem}.json", "shard index").get("plan") != task.fingerprint:
            raise InputError(
                f"{output} holds {stem} of another build (other samples or options); "
                "give --output a new folder, or delete that one first"
            )
    foreign = sorted(names - expected)
    if foreign:
        raise InputError(
            f"{output} already holds {foreign[0]!r}, which this build would not write; "
            "give --output a new or empty folder"
        )


def _run(
    tasks: list[_Task], processes: int, progress: Callable[[int, int], None]
) -> Iterator[_Written]:
    if processes <= 1 or len(tasks) == 1:
        for task in tasks:
            shard = _write_shard(task)
            progress(shard.planned, len(shard.failures))
            yield shard
        return
    # spawn: forking a process that may have threads (BLAS, progress bar) can deadlock its child
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(tasks)), mp_context=context) as pool:
        pending = [pool.submit(_write_shard, task) for task in tasks]
        try:
            for future in as_completed(pending):
                shard = future.result()
                progress(shard.planned, len(shard.failures))
                yield shard
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed from outside, often for lack of memory; run the same "
                "command again, with fewer --processes: finished shards are kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_shard(task: _Task) -> _Written:
    stem = _stem(task.number)
    marker = task.output / f"{stem}.json"
    if marker.is_file():
        return _describe(task, read_json(marker, "shard index"))
    packed, failures = _pack(task)
    samples: list[dict[str, Any]] = []
    if packed:
        try:
            with atomic_write(task.output / f"{stem}.tar") as file:
                samples = _write_tar(file, packed)
            with atomic_write(task.output / f"{stem}.idx") as file:
                file.write(_dali_index(samples).encode())
        except OSError as error:
            raise _out_of_disk(task.output, error) from None
    value = {
        "version": INDEX_VERSION,
        "plan": task.fingerprint,
        "sha256": _sha256(task.output / f"{stem}.tar") if packed else "",
        "failures": [asdict(failure) for failure in failures],
        "samples": samples,
    }
    write_json(marker, value)
    return _describe(task, value)


def _pack(task: _Task) -> tuple[list[PackedSample], list[Failure]]:
    packed, failures = [], []
    for item in task.items:
        try:
            raw = item.read()
            packed.append(
                pack_sample(item.key, item.source, raw, task.mask_mode, task.num_classes)
            )
        except SampleError as error:
            failures.append(Failure(item.key, item.source, error.stage, error.reason))
    return packed, failures


def _write_tar(file: IO[bytes], packed: list[PackedSample]) -> list[dict[str, Any]]:
    """Writes a ustar archive without times or owners and returns its index."""
    samples = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in packed:
            extents = {}
            for name, data in sample.components.items():
                info = tarfile.TarInfo(f"{sample.key}.{name}")
                info.size, info.mode, info.mtime = len(data), 0o644, 0
                extents[name] = [tar.offset + _TAR_BLOCK, len(data), zlib.crc32(data)]
                tar.addfile(info, io.BytesIO(data))
            samples.append(
                {
                    "key": sample.key,
                    "height": sample.height,
                    "width": sample.width,
                    "proposals": sample.proposals,
                    "components": extents,
                }
            )
    return samples


def _dali_index(samples: list[dict[str, Any]]) -> str:
    """wds2idx v1.2: a sample a line, `extension offset size filename` for each component."""
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        lines.append(
            " ".join(
                f"{name} {extent[0]} {extent[1]} {sample['key']}.{name}"
                for name, extent in sample["components"].items()
            )
        )
    return "\n".join(lines) + "\n"


def _describe(task: _Task, value: dict[str, Any]) -> _Written:
    stem = _stem(task.number)
    failures = tuple(Failure(**failure) for failure in value["failures"])
    samples = value["samples"]
    if not samples:
        return _Written(task.number, None, failures, len(task.items))
    entry = ShardEntry(
        name=f"{stem}.tar",
        samples=len(samples),
        masks=sum(MASK in sample["components"] for sample in samples),
        labels=sum(LABEL in sample["components"] for sample in samples),
        bytes=(task.output / f"{stem}.tar").stat().st_size,
        sha256=value["sha256"],
        index_sha256=_sha256(task.output / f"{stem}.json"),
    )
    return _Written(task.number, entry, failures, len(task.items))


def _write_failures(output: Path, failures: Sequence[Failure]) -> None:
    with atomic_write(output / FAILURES) as file:
        for failure in failures:
            file.write(json.dumps(asdict(failure), ensure_ascii=False).encode() + b"\n")
    sync_directory(output)


def _nothing_left(output: Path, failures: Sequence[Failure]) -> str:
    if not failures:
        return f"there is no sample to write to {output}; check the source's folders and lists"
    first = failures[0]
    return (
        f"not one of {len(failures)} samples could be used; the first, {first.source}: "
        f"{first.stage}: {first.reason}. All are in {output / FAILURES}"
    )


def _out_of_disk(output: Path, error: OSError) -> OSError:
    if error.errno == errno.ENOSPC:
        message = "no space left; free some and run the same command again: finished shards stay"
        return OSError(errno.ENOSPC, message, str(output))
    return error


def _stem(number: int) -> str:
    return f"shard-{number:06d}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
