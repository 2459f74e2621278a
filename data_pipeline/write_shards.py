"""Writes shards: a fixed plan, filled by several processes, byte for byte the same for any number.

A shard is `shard-N.tar`, then `shard-N.idx`, then `shard-N.json`, each written aside, synced and
renamed; the JSON is the commit marker, so a build that was killed goes on where it stopped.
"""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline.errors import InputError, SampleError
from data_pipeline.files import atomic_write, encode_json, only_writer, read_json, write_json
from data_pipeline.index import INDEX_VERSION
from data_pipeline.manifest import FILE_NAME, Manifest, ShardEntry
from data_pipeline.sample import LABEL, MASK, MaskMode, PackedSample, pack_sample
from data_pipeline.sources.item import Failure, Item, Listing

FAILURES = "failures.jsonl"
_TAR_BLOCK = 512
_LEFTOVER = re.compile(r"\.(shard-\d+|manifest|failures)\.[a-z]+\.\d+\.tmp")  # of atomic_write


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
        if self.shuffle_seed >= 2**64:
            raise InputError(f"the shuffle seed is {self.shuffle_seed}; it must be below 2^64")


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

    Every sample is decoded and checked; what fails is counted and named in `failures.jsonl`. A
    build that was interrupted goes on when it is called again, and samples that failed are tried
    again.

    Args:
        listing: what to write.
        output: folder of the shards; new, empty, or holding an interrupted build of the same.
        config: what decides the bytes.
        processes: worker processes; the result does not depend on them.
        progress: called with (samples done, samples failed) of each shard as it completes.

    Raises:
        InputError: the folder holds something else, cannot be written or is being written to by
            another process, or not one sample could be used.
        OSError: writing failed, as on a full disk; nothing half-written stays.
    """
    tasks = list(_plan(listing, output, config))
    _make_folder(output)
    with only_writer(output):
        _prepare_output(output, tasks)
        try:
            written = sorted(
                _run(tasks, processes, progress or (lambda done, failed: None)),
                key=lambda shard: shard.number,
            )
        finally:
            _remove_leftovers(output)
        failures = [
            *listing.failures,
            *(failure for shard in written for failure in shard.failures),
        ]
        entries = tuple(shard.entry for shard in written if shard.entry is not None)
        with _explained(output):
            _write_failures(output, failures)
            if not entries:
                for task in tasks:  # they hold nothing; the folder is free for another try
                    (output / f"{_stem(task.number)}.json").unlink(missing_ok=True)
                raise InputError(_nothing_left(output, failures))
            described = {**listing.description, **asdict(config)}
            manifest = Manifest(output, entries, listing.classes, len(failures), described)
            manifest.write()
        return manifest


def failure_counts(output: Path) -> dict[str, int]:
    """Reason -> number of samples, most frequent first, from `failures.jsonl`."""
    counts: Counter[str] = Counter()
    for line in (output / FAILURES).read_bytes().splitlines():  # as text it splits at U+2028 too
        failure = json.loads(line)
        counts[f"{failure['stage']}: {failure['reason'].split(' (')[0]}"] += 1
    return dict(counts.most_common())


def _plan(listing: Listing, output: Path, config: BuildConfig) -> Iterator[_Task]:
    items = list(listing.items)
    assert len({item.key for item in items}) == len(items), "sources give unique keys"
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


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{output} cannot be used as output ({error.strerror}); give --output another folder"
        ) from None
    if not os.access(output, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"{output} cannot be written to; give --output another folder")


def _prepare_output(output: Path, tasks: Sequence[_Task]) -> None:
    """Accepts a new or empty folder, or one that holds only shards of this very plan."""
    _remove_leftovers(output)
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    expected = {FILE_NAME, FAILURES}
    for task in tasks:
        stem = _stem(task.number)
        expected |= {f"{stem}.tar", f"{stem}.idx", f"{stem}.json"}
        if f"{stem}.json" in names and _read_marker(task).get("plan") != task.fingerprint:
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


def _remove_leftovers(output: Path) -> None:
    """Removes what writers that were killed have left; only ever called by the one writer."""
    for path in output.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            with suppress(OSError):  # of a full or failing disk, where the first error matters
                path.unlink()


def _run(
    tasks: list[_Task], processes: int, progress: Callable[[int, int], None]
) -> Iterator[_Written]:
    in_pool = processes > 1 and len(tasks) > 1
    for shard in _run_pool(tasks, processes) if in_pool else map(_write_shard, tasks):
        progress(shard.planned, len(shard.failures))
        yield shard


def _run_pool(tasks: list[_Task], processes: int) -> Iterator[_Written]:
    # spawn: forking a process that may have threads (BLAS, progress bar) can deadlock its child
    context = multiprocessing.get_context("spawn")
    alive, our_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        min(processes, len(tasks)), context, initializer=_watch_parent, initargs=(alive,)
    )
    try:
        with _interrupts_held():
            pending = [pool.submit(_write_shard, task) for task in tasks]
        for future in as_completed(pending):
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed from outside, often for lack of memory; run the same "
            "command again, with fewer --processes: finished shards are kept"
        ) from None
    except BaseException:
        our_end.close()  # an error or Ctrl-C: workers leave their shards and end at once
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        our_end.close()
        alive.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started within never see Ctrl-C, which is the parent's to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch_parent(alive: Connection) -> None:
    """Ends this worker as soon as the other end of the pipe is closed or its owner is dead."""

    def wait() -> None:
        alive.poll(None)
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _write_shard(task: _Task) -> _Written:
    stem = _stem(task.number)
    value = _finished(task)
    if value is not None:
        return _describe(task, value)
    packed, failures = _pack(task.items, task)
    samples: list[dict[str, Any]] = []
    with _explained(task.output):
        if packed:
            with atomic_write(task.output / f"{stem}.tar") as file:
                samples = _write_tar(file, packed)
            with atomic_write(task.output / f"{stem}.idx") as file:
                file.write(_dali_index(samples).encode())
        tar = task.output / f"{stem}.tar"
        value = {
            "version": INDEX_VERSION,
            "plan": task.fingerprint,
            "sha256": _sha256(tar) if packed else "",
            "bytes": tar.stat().st_size if packed else 0,
            "failures": [asdict(failure) for failure in failures],
            "samples": samples,
        }
        write_json(task.output / f"{stem}.json", value)
    return _describe(task, value)


def _finished(task: _Task) -> dict[str, Any] | None:
    """The marker of a shard that is complete; `None` if it is to be written (again).

    That is also so where a file of it is lost, or a sample that failed can be used by now.
    """
    stem = _stem(task.number)
    marker = task.output / f"{stem}.json"
    if not marker.is_file():
        return None
    value = _read_marker(task)
    items = {item.key: item for item in task.items}
    for sample in value["samples"]:
        item = items[sample["key"]]
        if list(item.sizes()) != sample["source_bytes"]:
            raise InputError(
                f"{task.output} holds {stem}, but files of {item.source} have changed since it was "
                "written; give --output a new folder, or delete that one first"
            )
    tar, dali_index = marker.with_suffix(".tar"), marker.with_suffix(".idx")
    whole = not value["samples"] or (
        tar.is_file() and tar.stat().st_size == value["bytes"] and dali_index.is_file()
    )
    failed = [items[failure["key"]] for failure in value["failures"]]
    if whole and not _pack(failed, task)[0]:
        return value
    with _explained(task.output):
        marker.unlink()  # first of all: killed after this, the shard counts as not written
    return None


def _read_marker(task: _Task) -> dict[str, Any]:
    path = task.output / f"{_stem(task.number)}.json"
    return read_json(path, "shard index", "delete it and run the same command again")


def _pack(
    items: Sequence[Item], task: _Task
) -> tuple[list[tuple[PackedSample, tuple[int, ...]]], list[Failure]]:
    """Samples with the sizes of their files, and those that cannot be used."""
    packed, failures = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata that is not taken along
        for item in items:
            try:
                raw = item.read()
                sample = pack_sample(item.key, item.source, raw, task.mask_mode, task.num_classes)
                packed.append((sample, item.sizes()))
            except SampleError as error:
                failures.append(Failure(item.key, item.source, error.stage, error.reason))
            except OSError as error:
                failures.append(Failure(item.key, item.source, "read", str(error)))
    return packed, failures


def _write_tar(
    file: IO[bytes], packed: list[tuple[PackedSample, tuple[int, ...]]]
) -> list[dict[str, Any]]:
    """Writes a ustar archive without times or owners and returns its index."""
    samples = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample, source_bytes in packed:
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
                    "source_bytes": list(source_bytes),
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
        bytes=value["bytes"],
        sha256=value["sha256"],
        index_sha256=_sha256(task.output / f"{stem}.json"),
    )
    return _Written(task.number, entry, failures, len(task.items))


def _write_failures(output: Path, failures: Sequence[Failure]) -> None:
    with atomic_write(output / FAILURES) as file:
        for failure in failures:
            file.write(encode_json(asdict(failure)) + b"\n")


def _nothing_left(output: Path, failures: Sequence[Failure]) -> str:
    if not failures:
        return f"there is no sample to write to {output}; check the source's folders and lists"
    first = failures[0]
    return (
        f"not one of {len(failures)} samples could be used; the first, {first.source}: "
        f"{first.stage}: {first.reason}. All are in {output / FAILURES}"
    )


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Says of an error in writing what it means and what to do; passes between processes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                "no space left; free some and run the same command again: finished shards stay"
            )
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(
                f"{output} cannot be written to ({error.strerror}); mend its rights and run the "
                "same command again, or give --output another folder"
            ) from None
        else:
            message = f"cannot be written ({error.strerror}); run the same command again to go on"
        raise OSError(error.errno or errno.EIO, message, str(output)) from None


def _stem(number: int) -> str:
    return f"shard-{number:06d}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
