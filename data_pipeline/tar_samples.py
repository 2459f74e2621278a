"""Finds the samples of a tar that has no index, made here or elsewhere, without changing it."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import SampleError
from data_pipeline.sample import INFO, LABEL, MASK, safe_key
from data_pipeline.sources.item import Failure
from data_pipeline.stored_sample import check_stored, parse_info

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER = 1 << 29  # bytes; nothing that large is an image, and it would be held in memory


@dataclass(frozen=True)
class MemberNames:
    """What a tar calls masks and labels: what follows the first dot of a file's name."""

    mask: str = MASK
    label: str = LABEL

    def slot(self, extension: str) -> str | None:
        """`image`, a component of ours, or `None` for what no one here reads."""
        known = {self.mask: MASK, self.label: LABEL, INFO: INFO}
        if extension in known:
            return known[extension]
        return "image" if extension.lower() in IMAGE_EXTENSIONS else None


@dataclass
class TarSamples:
    """What a tar holds.

    Attributes:
        samples: as an index lists them.
        failures: samples that cannot be read in place, and where the tar ends too early.
        bytes, sha256: of the tar.
    """

    samples: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class _Member:
    name: str
    extension: str
    offset: int
    data: bytes


class _HashingFile:
    """Hashes what passes through on its way from a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        while self.read(1 << 20):
            pass

    def close(self) -> None:
        self._file.close()


def scan_tar(path: Path, names: MemberNames, num_classes: int | None = None) -> TarSamples:
    """Reads a tar once from front to back, and decodes every component once.

    Samples are files that follow one another and share what comes before the first dot of their
    names, as in WebDataset. Of a tar that is cut short, the samples before the cut are kept.

    Raises:
        OSError: it cannot be read.
    """
    found = TarSamples()
    file = _HashingFile(path)
    try:
        seen: set[str] = set()
        cut = ""
        group: list[_Member] = []
        try:
            for member in _members(path, file, names, found.failures):
                if group and _stem(member.name) != _stem(group[0].name):
                    _add(found, path.name, group, names, num_classes, seen)
                    group = []
                group.append(member)
        except _CutError as error:
            cut = str(error)
        if group and (not cut or _looks_whole(group, names, found)):
            _add(found, path.name, group, names, num_classes, seen)
        elif group:
            reason = f"lies at the end of the archive, which {cut}"
            found.failures.append(_failure(path.name, _stem(group[0].name), "read", reason))
        if cut:
            reason = f"the archive {cut}; what follows is lost"
            found.failures.append(_failure(path.name, "", "read", reason))
        file.drain()
        found.bytes, found.sha256 = file.size, file.digest.hexdigest()
    finally:
        file.close()
    return found


class _CutError(Exception):
    """The archive ends, or goes on with something else, before its end mark."""


def _members(
    path: Path, file: _HashingFile, names: MemberNames, failures: list[Failure]
) -> Iterator[_Member]:
    """Regular files of the archive in order, with the bytes of those that are read.

    Raises:
        _CutError: after the last one that is whole.
    """
    end = 0
    try:
        with tarfile.open(
            fileobj=file,  # type: ignore[call-overload]
            mode="r|",
        ) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # else all headers stay
                end = tar.offset
                if not info.isfile() or info.issparse():
                    continue
                if info.size > MAX_MEMBER:
                    reason = f"{info.name} has {info.size:,} bytes; the limit is {MAX_MEMBER:,}"
                    failures.append(_failure(path.name, _stem(info.name), "read", reason))
                    continue
                extension, data = _extension(info.name), b""
                reader = tar.extractfile(info) if names.slot(extension) else None
                if reader is not None:
                    data = reader.read()
                    if len(data) != info.size:
                        raise _CutError(f"is cut short inside {info.name}")
                yield _Member(info.name, extension, info.offset_data, data)
    except tarfile.TarError as error:
        raise _CutError(f"is cut short or damaged ({error})") from None
    with path.open("rb") as again:
        again.seek(end)
        mark = again.read(tarfile.BLOCKSIZE)
    if len(mark) == tarfile.BLOCKSIZE and not any(mark):
        return
    if mark:
        raise _CutError(f"has no readable header at byte {end:,}")
    if os.stat(path).st_size < end:
        raise _CutError("is cut short inside its last file")
    raise _CutError("lacks its end mark")


def _looks_whole(group: list[_Member], names: MemberNames, found: TarSamples) -> bool:
    """Whether the last sample before a cut has all that the first one has, or image and mask."""
    held = {names.slot(member.extension) for member in group}
    wanted = {"image", MASK}
    if found.samples:
        components = found.samples[0]["components"]
        wanted = {name if name in (MASK, LABEL, INFO) else "image" for name in components}
    return wanted <= held


def _add(
    found: TarSamples,
    tar: str,
    group: list[_Member],
    names: MemberNames,
    num_classes: int | None,
    seen: set[str],
) -> None:
    """Adds one sample, or why it cannot be."""
    stem = _stem(group[0].name)
    slots: dict[str, _Member] = {}
    for member in group:
        slot = names.slot(member.extension)
        if slot is None:
            continue
        if slot in slots:
            what = f"has two of one kind, {slots[slot].name} and {member.name}"
            found.failures.append(_failure(tar, stem, "match", what))
            return
        slots[slot] = member
    if "image" not in slots:
        if slots:
            found.failures.append(_failure(tar, stem, "match", "has no image"))
        return
    key = safe_key(stem)
    if key in seen:
        found.failures.append(_failure(tar, stem, "match", "the archive has two of this name"))
        return
    try:
        found.samples.append(_describe(tar, key, slots, num_classes))
    except SampleError as error:
        found.failures.append(_failure(tar, stem, error.stage, error.reason))
        return
    seen.add(key)


def _describe(
    tar: str, key: str, slots: dict[str, _Member], num_classes: int | None
) -> dict[str, Any]:
    """What the index says of a sample; raises SampleError."""
    info: dict[str, Any] = {}
    if INFO in slots:
        try:
            info = parse_info(slots[INFO].data)
        except SampleError:  # it is theirs, and no one here reads it
            del slots[INFO]
    decoded = check_stored(
        {slot: member.data for slot, member in slots.items()}, num_classes, refuse_binary=True
    )
    components, members = {}, {}
    for slot, member in slots.items():
        name = decoded.image if slot == "image" else slot
        components[name] = [member.offset, len(member.data), zlib.crc32(member.data)]
        if member.name != f"{key}.{name}":
            members[name] = member.name
    source = info.get("source")
    sample: dict[str, Any] = {
        "key": key,
        "source": source if isinstance(source, str) else f"{tar}:{slots['image'].name}",
        "height": decoded.height,
        "width": decoded.width,
        "proposals": decoded.proposals,
        "components": components,
    }
    return sample | ({"members": members} if members else {})


def _stem(name: str) -> str:
    """What a sample's files share: path and name up to the first dot of the name."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    return folder + slash + file.partition(".")[0]


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2]


def _failure(tar: str, stem: str, stage: str, reason: str) -> Failure:
    return Failure(stem, f"{tar}:{stem}" if stem else tar, stage, reason)
