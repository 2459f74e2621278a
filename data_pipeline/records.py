"""`shard-N.records`: the shard's index as records of one size, so that one sample is read alone.

A header, a record a sample in the order of the index, then the keys one after the other, which only
messages and evaluation need. All of it is little-endian and follows from the `.json`, whose SHA-256
the header holds; so a file that belongs to another index is known as such.

    header  magic, version, bytes a record, samples, bytes of keys, SHA-256 of the index, SHA-256
            of all that follows, CRC-32 of the header so far
    record  offset and size of image, mask, label and info (-1: absent), their CRC-32, height,
            width, proposals, number of the image's component in IMAGE_COMPONENTS, place, size and
            CRC-32 of the key, CRC-32 of the record so far
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import OpenFile
from data_pipeline.sample import IMAGE_COMPONENTS, MAX_PIXELS

SUFFIX = ".records"
VERSION = 1
_MAGIC = b"MBRECORD"
_HEADER = struct.Struct("<8sIIQQ32s32sI")
_RECORD = struct.Struct("<8q4I3iB3xQ3I")
_COLUMNS = np.dtype(
    [
        ("places", "<i8", (4, 2)),
        ("crcs", "<u4", (4,)),
        ("numbers", "<i4", (3,)),
        ("image", "u1"),
        ("free", "u1", (3,)),
        ("key_offset", "<u8"),
        ("key_size", "<u4"),
        ("key_crc", "<u4"),
        ("crc", "<u4"),
    ]
)
_CRC_BYTES = 4
_BLOCK = 1 << 20

Extent = tuple[int, int, int]


class SampleRecord(NamedTuple):
    """Where one sample lies.

    Attributes:
        extents: (offset, size, CRC-32) of image, mask, label and info, `None` where it has none.
        height, width: of the upright image, pixels.
        image: name of the image's component (jpg, png, webp).
        proposals: object mask proposals.
    """

    extents: tuple[Extent | None, Extent | None, Extent | None, Extent | None]
    height: int
    width: int
    image: str
    proposals: int

    def fits(self, tar_bytes: int) -> bool:
        """Whether a tar of that size can hold it: a reader would ask for absurd memory else."""
        for offset, size, _ in filter(None, self.extents):
            if offset < 0 or size < 0 or size > tar_bytes - offset:
                return False
        return min(self.height, self.width) >= 1 and self.height * self.width <= MAX_PIXELS


class RecordsUnusable(Exception):
    """A file of records cannot be used: what is wrong with it.

    Attributes:
        outdated: it is not there, of another index or of another version; nothing is damaged.
    """

    def __init__(self, what: str, outdated: bool = False) -> None:
        super().__init__(what)
        self.outdated = outdated


@dataclass(frozen=True)
class _Header:
    samples: int
    key_bytes: int
    index: bytes
    body: bytes
    crc: int

    @property
    def file_bytes(self) -> int:
        return self.keys_start + self.key_bytes

    @property
    def keys_start(self) -> int:
        return _HEADER.size + self.samples * _RECORD.size


def encode_records(
    keys: Sequence[str],
    extents: NDArray[np.int64],
    sizes: NDArray[np.int32],
    image_names: Sequence[str],
    proposals: NDArray[np.int32],
    index_sha256: str,
) -> bytes:
    """The file's bytes, from the columns of `ShardIndex` and the SHA-256 of its `.json`."""
    count = len(keys)
    encoded = [key.encode("utf-8", "surrogatepass") for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype=np.uint64)
    table = np.zeros(count, _COLUMNS)
    table["places"] = extents[:, :, :2]
    table["crcs"] = np.where(extents[:, :, 1] < 0, 0, extents[:, :, 2])
    table["numbers"][:, :2] = sizes
    table["numbers"][:, 2] = proposals
    table["image"] = [IMAGE_COMPONENTS.index(name) for name in image_names]
    table["key_size"] = [len(key) for key in encoded]
    table["key_offset"] = ends - table["key_size"]
    table["key_crc"] = [zlib.crc32(key) for key in encoded]
    rows, first = memoryview(table.tobytes()), _first_crc(bytes.fromhex(index_sha256))
    table["crc"] = [
        zlib.crc32(rows[start : start + _RECORD.size - _CRC_BYTES], first + number & 0xFFFFFFFF)
        for number, start in enumerate(range(0, len(rows), _RECORD.size))
    ]
    body = table.tobytes() + b"".join(encoded)
    fields = (_MAGIC, VERSION, _RECORD.size, count, sum(map(len, encoded)))
    digests = (bytes.fromhex(index_sha256), hashlib.sha256(body).digest())
    header = _HEADER.pack(*fields, *digests, 0)[:-_CRC_BYTES]
    return header + struct.pack("<I", zlib.crc32(header)) + body


class RecordFile:
    """An open file of records; several threads may read it.

    It is read with `pread` and never mapped: one that is cut short meanwhile is an error and no
    crash.

    Args:
        path: of the file.
        index_sha256: of the index that it must have been made from.
        samples: that it must hold.

    Raises:
        RecordsUnusable: it is not there or does not fit.
    """

    def __init__(self, path: Path, index_sha256: str, samples: int) -> None:
        try:
            self._file = OpenFile(path)
            self._header = _read_header(self._file.descriptor, index_sha256, samples)
        except FileNotFoundError:
            raise RecordsUnusable("is missing", outdated=True) from None
        except OSError as error:
            raise RecordsUnusable(f"cannot be read ({error.strerror or error})") from None
        self._first = _first_crc(self._header.index)

    def record(self, sample: int) -> SampleRecord:
        """Where sample number `sample` lies; RecordsUnusable where its record is damaged."""
        fields = self._fields(sample)
        image_extent, mask, label, info = (
            None if size < 0 else (offset, size, crc)
            for offset, size, crc in zip(fields[0:8:2], fields[1:8:2], fields[8:12], strict=True)
        )
        height, width, proposals, image = fields[12:16]
        if image >= len(IMAGE_COMPONENTS):
            raise RecordsUnusable(f"has a record that cannot be ({sample})")
        four = (image_extent, mask, label, info)
        return SampleRecord(four, height, width, IMAGE_COMPONENTS[image], proposals)

    def key(self, sample: int) -> str:
        """The sample's key; RecordsUnusable where it is damaged."""
        offset, size, crc, _ = self._fields(sample)[16:]
        if offset + size > self._header.key_bytes:  # a stranger's file must not ask for gigabytes
            raise RecordsUnusable(f"has a record that cannot be ({sample})")
        data = self._read(size, self._header.keys_start + offset)
        if zlib.crc32(data) != crc:
            raise RecordsUnusable(f"has a damaged key ({sample})")
        return data.decode("utf-8", "surrogatepass")

    def check(self) -> None:
        """Reads all of it; RecordsUnusable where a byte is not as it was written."""
        digest, place = hashlib.sha256(), _HEADER.size
        while place < self._header.file_bytes:
            block = self._read(min(_BLOCK, self._header.file_bytes - place), place)
            digest.update(block)
            place += len(block)
        if digest.digest() != self._header.body:
            raise RecordsUnusable("is damaged: its checksum differs")

    def _fields(self, sample: int) -> tuple[int, ...]:
        data = self._read(_RECORD.size, _HEADER.size + sample * _RECORD.size)
        fields: tuple[int, ...] = _RECORD.unpack(data)
        # counted from the index's checksum and the place: no record of another one passes
        if zlib.crc32(data[:-_CRC_BYTES], self._first + sample & 0xFFFFFFFF) != fields[-1]:
            raise RecordsUnusable(f"has a damaged record ({sample})")
        return fields

    def _read(self, size: int, offset: int) -> bytes:
        try:
            data = os.pread(self._file.descriptor, size, offset)
        except OSError as error:
            raise RecordsUnusable(f"cannot be read ({error.strerror or error})") from None
        if len(data) != size:
            raise RecordsUnusable("is cut short")
        return data


def _read_header(descriptor: int, index_sha256: str, samples: int) -> _Header:
    data = os.pread(descriptor, _HEADER.size, 0)
    if len(data) < _HEADER.size:
        raise RecordsUnusable("is cut short")
    magic, version, record_bytes, count, key_bytes, index, body, crc = _HEADER.unpack(data)
    if magic == _MAGIC and version != VERSION:
        raise RecordsUnusable(f"is of version {version}, not {VERSION}", outdated=True)
    if magic != _MAGIC or record_bytes != _RECORD.size or zlib.crc32(data[:-_CRC_BYTES]) != crc:
        raise RecordsUnusable("is damaged: its header's checksum differs")
    if index.hex() != index_sha256:
        raise RecordsUnusable("was made from another index", outdated=True)
    header = _Header(count, key_bytes, index, body, crc)
    if os.fstat(descriptor).st_size != header.file_bytes or count != samples:
        raise RecordsUnusable("is cut short, or lists other samples than its shard has")
    return header


def _first_crc(index: bytes) -> int:
    """What the CRC of record 0 starts with; that of record n with n more."""
    return zlib.crc32(index)
