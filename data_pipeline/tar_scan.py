"""One pass over an archive, block by block: its SHA-256, and checksum and header of every span."""

import hashlib
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import InputError

BLOCK = 1 << 20  # bytes read at a time
HEADER = tarfile.BLOCKSIZE
_NAME_FIELD = 100  # a longer name lies in an extension header, and the header holds a part of it


@dataclass
class Span:
    """A member's bytes in an archive, and what was found there.

    Attributes:
        offset, size: of the bytes; the header is the block before them.
        crc: running CRC-32.
        seen: bytes passed so far; fewer than `size` where the archive ends early.
        broken: a part of it could not be read at all.
        header: the block before.
    """

    offset: int
    size: int
    crc: int = 0
    seen: int = 0
    broken: bool = False
    header: bytearray = field(default_factory=bytearray)

    @property
    def start(self) -> int:
        return max(0, self.offset - HEADER)

    @property
    def end(self) -> int:
        return self.offset + self.size

    def feed(self, block: bytes, position: int) -> None:
        """Takes its part of a block that lies at `position` of the archive."""
        end = min(self.end, position + len(block))
        if position < self.offset:
            first = max(self.start, position)
            self.header += block[first - position : min(self.offset, end) - position]
        if end > self.offset:
            first = max(self.offset, position)
            self.crc = zlib.crc32(memoryview(block)[first - position : end - position], self.crc)
            self.seen += max(0, end - first)

    def header_problem(self, member: str) -> str | None:
        """What is wrong with the header of a member of that name; `None` if nothing is."""
        try:
            info = tarfile.TarInfo.frombuf(bytes(self.header), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            return f"its header in the archive is damaged ({error})"
        extended = len(member.encode("utf-8", "surrogateescape")) > _NAME_FIELD
        if info.name.lstrip("./") != member.lstrip("./") and not extended and member.isascii():
            return f"the archive calls it {info.name!r}, not {member!r}"
        if info.size != self.size and not extended:
            return f"its header says {info.size:,} bytes, the index {self.size:,}"
        return None


@dataclass(frozen=True)
class Scanned:
    """An archive as it was found: its size, and SHA-256 (empty where a part was not readable)."""

    bytes: int
    sha256: str


def scan_archive(path: Path, spans: Iterable[Span]) -> Scanned:
    """Reads a file once, in order, feeding all spans; memory does not depend on its size.

    Raises:
        OSError: it cannot be opened.
    """
    waiting = deque(sorted(spans, key=lambda span: span.start))
    active: list[Span] = []
    digest, whole, position = hashlib.sha256(), True, 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        while position < size:
            try:
                block = os.pread(descriptor, min(BLOCK, size - position), position)
            except OSError:  # a bad place on the disk: what lies beside it may be fine
                block, whole = b"", False
            length = len(block) or min(BLOCK, size - position)
            digest.update(block)
            while waiting and waiting[0].start < position + length:
                active.append(waiting.popleft())
            for span in active:
                if block:
                    span.feed(block, position)
                else:
                    span.broken = True
            position += length
            active = [span for span in active if span.end > position]
    finally:
        os.close(descriptor)
    return Scanned(size, digest.hexdigest() if whole else "")


def read_spans(path: Path, extents: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """The bytes at (offset, size) by name; InputError where they end early."""
    with path.open("rb") as file:
        found = {}
        for name, (offset, size) in extents.items():
            file.seek(offset)
            found[name] = file.read(size)
            if len(found[name]) != size:
                raise InputError(f"{path} became shorter while it was read; run the command again")
    return found
