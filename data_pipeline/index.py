"""Where every sample of a shard lies: the shard's `.json`, as NumPy columns."""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from data_pipeline.files import parse_json, read_bytes
from data_pipeline.manifest import Manifest
from data_pipeline.sample import IMAGE_COMPONENTS, INFO, LABEL, MASK

INDEX_VERSION = 1
_SLOTS = ("image", MASK, LABEL, INFO)
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
    """

    keys: list[str]
    extents: NDArray[np.int64]
    sizes: NDArray[np.int32]
    image_names: list[str]

    def extent(self, sample: int, component: str) -> tuple[int, int, int] | None:
        """(offset, size, CRC-32) of a component, `None` where the sample lacks it."""
        offset, size, crc = self.extents[sample, _SLOTS.index(component)].tolist()
        return None if size < 0 else (offset, size, crc)


class DatasetIndex:
    """The index of all shards of a manifest; a shard's part is read when it is first needed."""

    def __init__(self, manifest: Manifest, cached_shards: int = 64) -> None:
        self.manifest = manifest
        self.counts = [shard.samples for shard in manifest.shards]
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self._cached_shards = cached_shards
        self._cache: OrderedDict[int, ShardIndex] = OrderedDict()
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
        loaded = self._load(number)
        with self._lock:
            self._cache[number] = loaded
            if len(self._cache) > self._cached_shards:
                self._cache.popitem(last=False)
        return loaded

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard number, sample number) of a global sample id."""
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, sample_id - int(self.starts[shard])

    def _load(self, number: int) -> ShardIndex:
        entry = self.manifest.shards[number]
        path = self.manifest.root / (entry.name.removesuffix(".tar") + ".json")
        data = read_bytes(path, "shard index", _REMEDY)
        if hashlib.sha256(data).hexdigest() != entry.index_sha256:
            raise InputError(
                f"{path} is not the index that the manifest describes; it is damaged, or the shard "
                f"was built again: {_REMEDY}"
            )
        try:
            index = _parse(parse_json(data, path, "shard index", _REMEDY)["samples"])
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged: {error}; {_REMEDY}") from None
        if len(index.keys) != entry.samples:
            raise InputError(
                f"{path} lists {len(index.keys)} samples, the manifest {entry.samples}: {_REMEDY}"
            )
        return index


def _parse(samples: list[dict[str, Any]]) -> ShardIndex:
    extents = np.full((len(samples), len(_SLOTS), 3), -1, np.int64)
    sizes = np.empty((len(samples), 2), np.int32)
    keys, image_names = [], []
    for number, sample in enumerate(samples):
        keys.append(str(sample["key"]))
        sizes[number] = sample["height"], sample["width"]
        for name, extent in sample["components"].items():
            if name in IMAGE_COMPONENTS:
                image_names.append(name)
                extents[number, 0] = extent
            else:
                extents[number, _SLOTS.index(name)] = extent
    if len(image_names) != len(samples):
        raise ValueError("a sample has no image or several")
    return ShardIndex(keys, extents, sizes, image_names)
