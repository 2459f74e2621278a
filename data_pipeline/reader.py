"""Bytes of samples by number, checksum first."""

import os
import threading
import zlib
from collections import OrderedDict
from contextlib import suppress

from data_pipeline.errors import InputError, SampleError
from data_pipeline.files import OpenFile
from data_pipeline.index import DatasetIndex
from data_pipeline.records import Extent, SampleRecord
from data_pipeline.sample import LABEL, MASK, StoredSample

_OPEN_FILES_PER_THREAD = 32


class SampleReader:
    """Reads samples at known offsets with `pread`; safe to use from several threads.

    Files are never mapped into memory, so one that is cut short is an error and no crash.
    """

    def __init__(self, index: DatasetIndex) -> None:
        self.index = index
        self._local = threading.local()  # descriptors belong to one thread: no closing under a read

    def read(
        self, shard: int, sample: int, label: bool = False, record: SampleRecord | None = None
    ) -> StoredSample:
        """Image, mask (where there is one) and, if asked for, label of one sample.

        Args:
            shard, sample: numbers.
            label: read it too.
            record: of the sample, if it was read already.

        Raises:
            SampleError: a component cannot be read in full or fails its checksum.
            InputError: the shard's index cannot be used.
        """
        record = record or self.index.record(shard, sample)
        place = (shard, sample)
        image_extent, mask_extent, label_extent, _ = record.extents
        image = self._component(*place, "image", image_extent)
        if image is None:
            raise SampleError("read", f"{self.describe(shard, sample)} has no image")
        mask = self._component(*place, MASK, mask_extent)
        found = self._component(*place, LABEL, label_extent) if label else None
        return StoredSample(image, mask, found)

    def read_ahead(self, shard: int) -> None:
        """Downloads a shard that lies at an address, if it is not in the cache."""
        manifest = self.index.manifest
        if manifest.cache is not None:
            entry = manifest.shards[shard]
            with suppress(OSError):  # told when its samples are read
                try:
                    manifest.records_path(entry)
                except OSError:
                    manifest.index_path(entry)
                manifest.shard_path(entry)

    def describe(self, shard: int, sample: int) -> str:
        """Shard file and key of a sample, for messages; its number where no index can be read."""
        name = self.index.manifest.shards[shard].name
        try:
            return f"{name}:{self.index.key(shard, sample)}"
        except InputError:
            return f"{name}:sample {sample}"

    def _component(
        self, shard: int, sample: int, component: str, extent: Extent | None
    ) -> bytes | None:
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
        files: OrderedDict[int, OpenFile] | None = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = OrderedDict()
        file = files.get(shard)
        if file is None:
            manifest = self.index.manifest
            file = OpenFile(manifest.shard_path(manifest.shards[shard]))
            files[shard] = file
            if len(files) > _OPEN_FILES_PER_THREAD:
                files.popitem(last=False)
        else:
            files.move_to_end(shard)
        return file.descriptor
