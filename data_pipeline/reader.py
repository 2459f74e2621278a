"""Bytes of samples by number, checksum first."""

import os
import threading
import zlib
from collections import OrderedDict
from contextlib import suppress

from data_pipeline.errors import SampleError
from data_pipeline.index import DatasetIndex
from data_pipeline.sample import LABEL, MASK, StoredSample

_OPEN_FILES_PER_THREAD = 32


class SampleReader:
    """Reads samples at known offsets with `pread`; safe to use from several threads.

    Files are never mapped into memory, so one that is cut short is an error and no crash.
    """

    def __init__(self, index: DatasetIndex) -> None:
        self.index = index
        self._local = threading.local()  # descriptors belong to one thread: no closing under a read

    def read(self, shard: int, sample: int, label: bool = False) -> StoredSample:
        """Image, mask (where there is one) and, if asked for, label of one sample.

        Raises:
            SampleError: a component cannot be read in full or fails its checksum.
            InputError: the shard's index cannot be used.
        """
        image = self._component(shard, sample, "image")
        if image is None:
            raise SampleError("read", f"{self.describe(shard, sample)} has no image")
        mask = self._component(shard, sample, MASK)
        return StoredSample(image, mask, self._component(shard, sample, LABEL) if label else None)

    def read_ahead(self, shard: int) -> None:
        """Downloads a shard that lies at an address, if it is not in the cache."""
        manifest = self.index.manifest
        if manifest.cache is not None:
            with suppress(OSError):  # told when its samples are read
                manifest.index_path(manifest.shards[shard])
                manifest.shard_path(manifest.shards[shard])

    def describe(self, shard: int, sample: int) -> str:
        """Shard file and key of a sample, for messages; InputError without its index."""
        name = self.index.manifest.shards[shard].name
        return f"{name}:{self.index.shard(shard).keys[sample]}"

    def _component(self, shard: int, sample: int, component: str) -> bytes | None:
        extent = self.index.shard(shard).extent(sample, component)
        if extent is None:
            return None
        offset, size, crc = extent
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            where = self.describe(shard, sample)
            raise SampleError("read", f"{where}.{component}: {error.strerror or error}") from None
        if len(data) != size:
            where = self.describe(shard, sample)
            raise SampleError("read", f"{where}.{component}: the shard is cut short")
        if zlib.crc32(data) != crc:
            where = self.describe(shard, sample)
            raise SampleError("read", f"{where}.{component}: the checksum differs")
        return data

    def _descriptor(self, shard: int) -> int:
        files: OrderedDict[int, _File] | None = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = OrderedDict()
        file = files.get(shard)
        if file is None:
            manifest = self.index.manifest
            file = _File(str(manifest.shard_path(manifest.shards[shard])))
            files[shard] = file
            if len(files) > _OPEN_FILES_PER_THREAD:
                files.popitem(last=False)
        else:
            files.move_to_end(shard)
        return file.descriptor


class _File:
    """A descriptor that is closed with its owner, also when the thread ends."""

    def __init__(self, path: str) -> None:
        # not blocking: a pipe in the place of a shard is then an error instead of a wait
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        descriptor = getattr(self, "descriptor", None)
        if descriptor is not None:
            os.close(descriptor)
