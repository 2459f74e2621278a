"""One shard: its archive, two indexes of it, and the marker that says that it is complete.

They are written in this order, each aside and then renamed; so a shard whose `.json` is there is
whole, whatever happened to the process that wrote it.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import IO, Any

from data_pipeline.files import encode_json, parse_json
from data_pipeline.index import INDEX_VERSION, dali_index, parse_samples
from data_pipeline.manifest import ShardEntry
from data_pipeline.records import SUFFIX as RECORDS
from data_pipeline.sample import LABEL, MASK, PackedSample
from data_pipeline.sources.item import Failure
from data_pipeline.store import Store

Marker = dict[str, Any]
DUPLICATE = "duplicate"  # stage of a failure
# parts of a ustar header that are the same for all members
_MODE_AND_OWNER = b"0000644\0" + 2 * b"0000000\0"
_TIME = b"00000000000\0"

_AFTER_CHECKSUM = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
_HEADER_SUM = sum(_MODE_AND_OWNER + _TIME + 8 * b" " + _AFTER_CHECKSUM)
_REMEDY = "delete it and run the same command again"


def shard_stem(number: int) -> str:
    return f"shard-{number:06d}"


class ShardWriter:
    """Writes samples one after the other to an open file, as ustar without times or owners.

    Attributes:
        samples: what the marker says of each.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.samples: list[dict[str, Any]] = []
        self._file = _HashingFile(file)

    def add(self, sample: PackedSample, source: str, source_bytes: tuple[int, ...]) -> None:
        described = {
            "key": sample.key,
            "source": source,
            "height": sample.height,
            "width": sample.width,
            "proposals": sample.proposals,
            "source_bytes": list(source_bytes),
        }
        self.copy(described, sample.components)

    def copy(self, described: dict[str, Any], components: dict[str, bytes]) -> None:
        """Adds a sample that has been described before; only its place is new."""
        extents = {}
        for name, data in components.items():
            header = _ustar_header(f"{described['key']}.{name}".encode("ascii"), len(data))
            extents[name] = [self._file.size + len(header), len(data), zlib.crc32(data)]
            self._file.write(header + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        self.samples.append({**described, "components": extents})

    def close(self) -> tuple[int, str]:
        """Ends the archive; its bytes and SHA-256."""
        end = 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(end + -(self._file.size + end) % tarfile.RECORDSIZE))
        return self._file.size, self._file.digest.hexdigest()


def write_shard(
    store: Store,
    number: int,
    fingerprint: str,
    fill: Callable[[ShardWriter], list[Failure]],
) -> Marker:
    """Writes one shard and returns its marker; one without samples has a marker only.

    Args:
        store: where to.
        number: of the shard.
        fingerprint: of its plan, kept in the marker.
        fill: adds the samples; returns what could not be added.
    """
    stem = shard_stem(number)
    marker: Marker = {"version": INDEX_VERSION, "plan": fingerprint, "sha256": "", "bytes": 0}
    try:
        with store.writing(f"{stem}.tar") as file:
            writer = ShardWriter(file)
            failures = fill(writer)
            if not writer.samples:
                raise _NothingToWrite
            marker["bytes"], marker["sha256"] = writer.close()
    except _NothingToWrite:
        for suffix in (".tar", ".idx", RECORDS):
            store.remove(stem + suffix)
    else:
        with store.writing(f"{stem}.idx") as file:
            file.write(dali_index(writer.samples))
    marker["failures"] = [asdict(failure) for failure in failures]
    marker["samples"] = writer.samples
    data = encode_json(marker) + b"\n"
    if writer.samples:
        write_records(store, number, marker, data)
    with store.writing(f"{stem}.json") as file:
        file.write(data)
    return marker


def write_records(store: Store, number: int, marker: Marker, data: bytes) -> None:
    """Writes the index as records of one size; `data` is the marker as it is in its file."""
    index = parse_samples(marker["samples"], marker["bytes"])
    with store.writing(shard_stem(number) + RECORDS) as file:
        file.write(index.encode_records(hashlib.sha256(data).hexdigest()))


def read_marker(store: Store, number: int) -> Marker | None:
    """The marker of a shard, `None` if it is not there.

    Raises:
        InputError: it is damaged.
    """
    found = read_marker_bytes(store, number)
    return None if found is None else found[0]


def read_marker_bytes(store: Store, number: int) -> tuple[Marker, bytes] | None:
    """`read_marker`, and the bytes of the file."""
    name = f"{shard_stem(number)}.json"
    try:
        with store.open(name) as file:
            data = file.read()
    except FileNotFoundError:
        return None
    return parse_json(data, f"{store}/{name}", "shard index", _REMEDY), data


def shard_entry(number: int, marker: Marker, data: bytes) -> ShardEntry | None:
    """What the manifest says of a shard with this marker; `None` for one without samples."""
    samples = marker["samples"]
    if not samples:
        return None
    return ShardEntry(
        name=f"{shard_stem(number)}.tar",
        samples=len(samples),
        masks=sum(MASK in sample["components"] for sample in samples),
        labels=sum(LABEL in sample["components"] for sample in samples),
        bytes=marker["bytes"],
        sha256=marker["sha256"],
        index_sha256=hashlib.sha256(data).hexdigest(),
    )


def is_whole(store: Store, number: int, marker: Marker) -> bool:
    """Whether the files that a marker speaks of are there, in its size."""
    stem = shard_stem(number)
    if not marker["samples"]:
        return True
    return store.size(f"{stem}.tar") == marker["bytes"] and store.size(f"{stem}.idx") >= 0


def read_components(
    store: Store, number: int, samples: Iterable[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """(description, component -> bytes) of samples of a shard, in the order given.

    Raises:
        OSError: the bytes are not those that the marker describes.
    """
    name = f"{shard_stem(number)}.tar"
    with store.open(name) as file:
        for sample in samples:
            components = {}
            for component, (offset, size, crc) in sample["components"].items():
                file.seek(offset)
                data = file.read(size)
                if len(data) != size or zlib.crc32(data) != crc:
                    raise OSError(
                        f"{store}/{name}: {sample['key']}.{component} is damaged; "
                        "delete that shard's files and run the same command again"
                    )
                components[component] = data
            yield sample, components


def _ustar_header(name: bytes, size: int) -> bytes:
    """What tarfile writes for a regular file of mode 644 without times or owners, much faster."""
    assert len(name) <= 100, "keys are short"
    size_field = b"%011o\0" % size
    checksum = _HEADER_SUM + sum(name) + sum(size_field)
    before = name.ljust(100, b"\0") + _MODE_AND_OWNER + size_field + _TIME
    return before + b"%06o\0 " % checksum + _AFTER_CHECKSUM


class _NothingToWrite(Exception):
    """Leaves the file's context, so that it does not come to be."""


class _HashingFile:
    """Counts and hashes what passes through to a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self._file = file

    def write(self, data: bytes) -> None:
        self.size += len(data)
        self.digest.update(data)
        self._file.write(data)
