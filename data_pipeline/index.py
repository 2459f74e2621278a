"""Where every sample of a shard lies: the shard's `.json`, as NumPy columns."""

import hashlib
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
from data_pipeline.sample import IMAGE_COMPONENTS, INFO, LABEL, MASK, MAX_PIXELS

INDEX_VERSION = 1
_SLOTS = ("image", MASK, LABEL, INFO)
_MAX_CRC = 2**32 - 1
_REMEDY = "copy the whole folder here again or build the shards again"


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

    def extent(self, sample: int, component: str) -> tuple[int, int, int] | None:
        """(offset, size, CRC-32) of a component, `None` where the sample lacks it."""
        offset, size, crc = self.extents[sample, _SLOTS.index(component)].tolist()
        return None if size < 0 else (offset, size, crc)


class DatasetIndex:
    """The index of all shards of a manifest; a shard's part is read when it is first needed.

    One that cannot be used is not read again: what was wrong with it is kept instead.
    """

    def __init__(self, manifest: Manifest, cached_shards: int = 64) -> None:
        self.manifest = manifest
        self.counts = [shard.samples for shard in manifest.shards]
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self._cached_shards = cached_shards
        self._cache: OrderedDict[int, ShardIndex] = OrderedDict()
        self._unusable: dict[int, str] = {}
        self._lock = threading.Lock()

    @cached_property
    def samples(self) -> int:
        return int(self.starts[-1])

    def shard(self, number: int) -> ShardIndex:
        """Index of shard `number` of the manifest; InputError where it does not fit the shard."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
            known = self._unusable.get(number)
        if known is not None:
            raise InputError(known)
        try:
            loaded = self._load(self.manifest.shards[number])
        except InputError as error:
            with self._lock:
                self._unusable[number] = str(error)
            raise
        with self._lock:
            self._cache[number] = loaded
            if len(self._cache) > self._cached_shards:
                self._cache.popitem(last=False)
        return loaded

    def _load(self, entry: ShardEntry) -> ShardIndex:
        try:
            path = self.manifest.index_path(entry)
        except OSError as error:
            raise InputError(f"{self.manifest}/{entry.index} cannot be read: {error}") from None
        return read_index(self.manifest.root, entry, path)[0]

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard number, sample number) of a global sample id."""
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, sample_id - int(self.starts[shard])


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
        index = _parse(value["samples"], entry.bytes)
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


def _parse(samples: list[dict[str, Any]], tar_bytes: int) -> ShardIndex:
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
