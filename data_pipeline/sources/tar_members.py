"""Where the files of a tar lie: headers only, contents are passed over, memory is bounded.

Python's own `tarfile` reads a long name or attribute record whole, whatever size its header claims.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

_BLOCK = tarfile.BLOCKSIZE
_MAX_RECORD = 1 << 20  # bytes of a long name or of attributes
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_RECORDS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_ATTRIBUTE = re.compile(rb"(\d{1,7}) ([^=]+)=")
_REFUSED = {
    tarfile.SYMTYPE: "a link",
    tarfile.LNKTYPE: "a link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, and the place of its bytes. `refused` says why it is not read."""

    name: str
    offset: int
    size: int
    refused: str = ""


class TarDamage(Exception):
    """The tar cannot be read on from here; says why and at which byte."""


def scan_members(file: IO[bytes], size: int) -> Iterator[Member]:
    """Yields the files of a tar in their order; folders and devices are passed over.

    Args:
        file: with `seek`; of its bytes, only headers are read.
        size: of the tar.

    Raises:
        TarDamage: a header is damaged, a member is cut off, or the tar ends without its end mark.
    """
    kind = _COMPRESSED.get(file.read(2))
    if kind:
        raise TarDamage(f"is compressed ({kind}); members are read in place: unpack it first")
    offset, attributes, ended = 0, dict[str, str](), False
    while offset + _BLOCK <= size:
        file.seek(offset)
        header = file.read(_BLOCK)
        if not header.strip(b"\0") and len(header) == _BLOCK:
            ended = True
            break
        info = _parse(header, offset)
        start = offset + _BLOCK
        length = _number(attributes.get("size", ""), info.size, offset)
        if not (info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in _RECORDS):
            length = 0  # links and folders have no bytes, whatever their header says
        if length < 0 or start + length > size:
            raise TarDamage(f"is cut off, or damaged, in the member at byte {offset:,}")
        if info.type in _RECORDS:
            if length > _MAX_RECORD:
                raise TarDamage(f"has a record of {length:,} bytes at byte {offset:,}")
            attributes |= _record(info.type, file.read(length))
        else:
            name = attributes.get("path", info.name)
            sparse = any(key.startswith("GNU.sparse.") for key in attributes)
            refused = "a sparse file" if sparse else _REFUSED.get(info.type, "")
            if info.type in _REGULAR or refused:
                yield Member(name, start, length, refused)
            attributes = {}
        offset = start + -(-length // _BLOCK) * _BLOCK
    if not ended:
        raise TarDamage(
            f"ends without an end mark at byte {min(offset, size):,}: it may be cut off"
        )


def _parse(header: bytes, offset: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarDamage(f"has a damaged header at byte {offset:,} ({error})") from None


def _number(text: str, otherwise: int, offset: int) -> int:
    if text and not (text.isdecimal() and len(text) < 20):
        raise TarDamage(f"has a damaged size at byte {offset:,}")
    return int(text) if text else otherwise


def _record(kind: bytes, record: bytes) -> dict[str, str]:
    """Attributes of the member that follows; of a pax record, lines of length, name and value."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(record.rstrip(b"\0"))}
    if kind not in _PAX:
        return {}
    found, place = {}, 0
    while match := _ATTRIBUTE.match(record, place):
        end = place + int(match[1])
        if end <= match.end():
            break
        found[_text(match[2])] = _text(record[match.end() : end - 1])
        place = end
    return found


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
