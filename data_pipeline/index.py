"""Where every sample lies: one by one from a shard's `.records`, or from its whole `.json`."""

import hashlib
import logging
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from data_pipeline.files import parse_json, read_bytes
from data_pipeline.manifest import Manifest, ShardEntry
from data_pipeline.records import RecordFile, RecordsUnusable, SampleRecord, encode_records
from data_pipeline.sample import IMAGE_COMPONENTS, INFO, LABEL, MASK, MAX_PIXELS

INDEX_VERSION = 1
_SLOTS = ("image", MASK, LABEL, INFO)
_MAX_CRC = 2**32 - 1
_REMEDY = "copy the whole folder here again or build the shards again"
_CACHED_BYTES = 1 << 28  # of whole indexes
_CACHED_INDEXES = 2  # at the least
_OPEN_RECORDS = 64
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard.

    Attributes:
        keys: sample keys, n of them.
        extents: int64 [n, 4, 3]: offset, size and CRC-32 of image, mask, label and info; size -1
            where the sample has no such component.
        sizes: int32 [n, 2]: height and width of the upright image, pixels.
        image_names: the image's component name (jpg, png, webp), n of them.
        proposals: int32 [n]: object mask proposals of each sample.
    """

    keys: list[str]
    extents: NDArray[np.int64]
    sizes: NDArray[np.int32]
    image_names: list[str]
    proposals: NDArray[np.int32]

    @cached_property
    def nbytes(self) -> int:
        """Bytes in memory, about."""
        keys = sum(map(sys.getsizeof, self.keys)) + 8 * 2 * len(self.keys)
        return keys + self.extents.nbytes + self.sizes.nbytes + self.proposals.nbytes

    def extent(self, sample: int, component: str) -> tuple[int, int, int] | None:
        """(offset, size, CRC-32) of a component, `None` where the sample lacks it."""
        return self.record(sample).extents[_SLOTS.index(component)]

    def record(self, sample: int) -> SampleRecord:
        """What is said of one sample."""
        image, mask, label, info = (
            None if size < 0 else (offset, size, crc)
            for offset, size, crc in self.extents[sample].tolist()
        )
        height, width = self.sizes[sample].tolist()
        name, proposals = self.image_names[sample], int(self.proposals[sample])
        return SampleRecord((image, mask, label, info), height, width, name, proposals)

    def encode_records(self, index_sha256: str) -> bytes:
        """The bytes of the shard's `.records`; the checksum is that of its `.json`."""
        columns = (self.keys, self.extents, self.sizes, self.image_names, self.proposals)
        return encode_records(*columns, index_sha256)


class DatasetIndex:
    """The index of all shards of a manifest.

    A sample's record is read alone from its shard's `.records`. Where that cannot be used, the
    shard's whole `.json` is read instead and kept; one `.json` that cannot be used is not read
    again: what was wrong with it is kept.

    Args:
        manifest: of the shards.
        cached_bytes: of whole indexes that are kept, two of them in any case.
    """

    def __init__(self, manifest: Manifest, cached_bytes: int = _CACHED_BYTES) -> None:
        self.manifest = manifest
        self.counts = [shard.samples for shard in manifest.shards]
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self._cached_bytes = cached_bytes
        self._cache: OrderedDict[int, ShardIndex] = OrderedDict()
        self._unusable: dict[int, str] = {}
        # shared by all threads: whoever reads holds the file, so that none is closed under a read
        self._records: OrderedDict[int, RecordFile] = OrderedDict()
        self._by_json: dict[int, bool] = {}  # shards without usable records -> just outdated
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    @cached_property
    def samples(self) -> int:
        return int(self.starts[-1])

    def record(self, shard: int, sample: int) -> SampleRecord:
        """Where a sample lies; InputError where the shard's index does not fit the shard."""
        try:
            if (records := self._open_records(shard)) is not None:
                found = records.record(sample)
                if not found.fits(self.manifest.shards[shard].bytes):
                    raise RecordsUnusable(f"has a record that cannot be ({sample})")
                return found
        except RecordsUnusable as problem:
            self._read_json_instead(shard, problem)
        return self.shard(shard).record(sample)

    def key(self, shard: int, sample: int) -> str:
        """A sample's key; InputError where the shard's index does not fit the shard."""
        try:
            if (records := self._open_records(shard)) is not None:
                return records.key(sample)
        except RecordsUnusable as problem:
            self._read_json_instead(shard, problem)
        return self.shard(shard).keys[sample]

    def shard(self, number: int) -> ShardIndex:
        """Whole index of shard `number`; InputError where it does not fit the shard."""
        if (found := self._cached(number)) is not None:
            return found
        with self._loading:  # parsing one takes ten times its size: never two at a time
            if (found := self._cached(number)) is not None:
                return found
            try:
                loaded = self._load(self.manifest.shards[number])
            except InputError as error:
                with self._lock:
                    self._unusable[number] = str(error)
                raise
            with self._lock:
                self._cache[number] = loaded
                while (
                    len(self._cache) > _CACHED_INDEXES
                    and sum(each.nbytes for each in self._cache.values()) > self._cached_bytes
                ):
                    self._cache.popitem(last=False)
        return loaded

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard number, sample number) of a global sample id."""
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, sample_id - int(self.starts[shard])

    def _cached(self, number: int) -> ShardIndex | None:
        with self._lock:
            known, found = self._unusable.get(number), self._cache.get(number)
            if found is not None:
                self._cache.move_to_end(number)
        if known is not None:
            raise InputError(known)
        return found

    def _load(self, entry: ShardEntry) -> ShardIndex:
        try:
            path = self.manifest.index_path(entry)
        except OSError as error:
            raise InputError(f"{self.manifest}/{entry.index} cannot be read: {error}") from None
        return read_index(self.manifest.root, entry, path)[0]

    def _open_records(self, shard: int) -> RecordFile | None:
        """The shard's records, `None` where they are known to be unusable."""
        with self._lock:
            if shard in self._by_json:
                return None
            if (found := self._records.get(shard)) is not None:
                self._records.move_to_end(shard)
                return found
        entry = self.manifest.shards[shard]
        try:
            path = self.manifest.records_path(entry)
        except FileNotFoundError:
            raise RecordsUnusable("is missing", outdated=True) from None
        except OSError as error:
            raise RecordsUnusable(f"cannot be read ({error})") from None
        opened = RecordFile(path, entry.index_sha256, entry.samples)
        with self._lock:
            self._records[shard] = opened
            if len(self._records) > _OPEN_RECORDS:
                self._records.popitem(last=False)
        return opened

    def _read_json_instead(self, shard: int, problem: RecordsUnusable) -> None:
        """Says once that records are outdated; that they are damaged at 1, 10, 100 … shards."""
        with self._lock:
            if shard in self._by_json:
                return
            self._by_json[shard] = problem.outdated
            self._records.pop(shard, None)
            alike = sum(other == problem.outdated for other in self._by_json.values())
        entry = self.manifest.shards[shard]
        self.manifest.forget_records(entry)
        if alike == 1 or (not problem.outdated and str(alike).rstrip("0") == "1"):
            where = "on the folder that it was copied from" if self.manifest.cache else "there"
            log.warning(
                "%s/%s %s%s; a shard's whole .json is read instead, which is slow and takes "
                "memory: run `maskbank shards records` %s",
                *(self.manifest, entry.records, problem),
                *(f" ({alike} shards so far)" if alike > 1 else "", where),
            )


def read_index(
    root: Path, entry: ShardEntry, path: Path | None = None
) -> tuple[ShardIndex, dict[str, Any]]:
    """The index of a shard, in `root` or at `path`, as columns and as the JSON that the file holds.

    Raises:
        InputError: it cannot be read, or is not the one that the manifest describes.
    """
    path = path or root / entry.index
    data = read_bytes(path, "shard index", _REMEDY)
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        raise InputError(
            f"{path} is not the index that the manifest describes; it is damaged, or the shard "
            f"was built again: {_REMEDY}"
        )
    try:
        value = parse_json(data, path, "shard index", _REMEDY)
        index = parse_samples(value["samples"], entry.bytes)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is damaged: {error}; {_REMEDY}") from None
    if len(index.keys) != entry.samples:
        raise InputError(
            f"{path} lists {len(index.keys)} samples, the manifest {entry.samples}: {_REMEDY}"
        )
    return index, value


def member_name(sample: dict[str, Any], component: str) -> str:
    """What the tar calls a component: `KEY.component`, unless others made the tar."""
    named = sample.get("members", {}).get(component)
    return str(named) if named else f"{sample['key']}.{component}"


def dali_index(samples: list[dict[str, Any]]) -> bytes:
    """wds2idx v1.2: a sample a line, `extension offset size filename` for each component."""
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        parts = []
        for name, extent in sample["components"].items():
            member = member_name(sample, name)
            extension = member.rpartition("/")[2].partition(".")[2]
            parts.append(f"{extension} {extent[0]} {extent[1]} {member}")
        lines.append(" ".join(parts))
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def parse_samples(samples: list[dict[str, Any]], tar_bytes: int) -> ShardIndex:
    """The columns of what a `.json` says of samples; many kinds of errors where it is damaged."""
    extents = np.full((len(samples), len(_SLOTS), 3), -1, np.int64)
    sizes = np.empty((len(samples), 2), np.int32)
    proposals = np.zeros(len(samples), np.int32)
    keys, image_names = [], []
    for number, sample in enumerate(samples):
        keys.append(str(sample["key"]))
        sizes[number] = sample["height"], sample["width"]
        proposals[number] = sample.get("proposals", 0)
        for name, extent in sample["components"].items():
            if name in IMAGE_COMPONENTS:
                image_names.append(name)
                extents[number, 0] = extent
            else:
                extents[number, _SLOTS.index(name)] = extent
        if len(image_names) != number + 1:
            raise ValueError(f"sample {keys[-1]!r} has no image or several")
    _check_numbers(extents, sizes, tar_bytes)
    return ShardIndex(keys, extents, sizes, image_names, proposals)


def _check_numbers(extents: NDArray[np.int64], sizes: NDArray[np.int32], tar_bytes: int) -> None:
    """Raises ValueError for what no shard can have: a reader would ask for absurd memory."""
    present = extents[(extents != -1).any(axis=-1)]
    offset, size, crc = present.T
    if (present < 0).any() or (crc > _MAX_CRC).any() or (size > tar_bytes - offset).any():
        raise ValueError("a component lies outside its shard")
    pixels = sizes.astype(np.int64).prod(axis=-1)
    if (sizes < 1).any() or (pixels > MAX_PIXELS).any():
        raise ValueError(f"an image has no pixels, or more than {MAX_PIXELS:,}")
