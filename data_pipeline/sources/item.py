"""The one form in which every source hands its samples to the shard writer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sample import IGNORE, RawSample, safe_key


class Item(Protocol):
    """One sample, not yet read. Picklable, since worker processes read it."""

    @property
    def key(self) -> str: ...

    @property
    def source(self) -> str: ...

    def read(self) -> RawSample:
        """Reads the bytes; raises SampleError or OSError when that fails."""
        ...

    def sizes(self) -> tuple[int, ...]:
        """Bytes of the files behind it, -1 where missing: a build that goes on compares them."""
        ...


@dataclass(frozen=True)
class FileItem:
    """A sample of up to three files."""

    key: str
    source: str
    image: Path
    mask: Path | None
    label: Path | None

    def read(self) -> RawSample:
        return RawSample(
            _read(self.image, "image"),
            None if self.mask is None else _read(self.mask, "mask"),
            None if self.label is None else _read(self.label, "label"),
        )

    def sizes(self) -> tuple[int, ...]:
        files = (self.image, self.mask, self.label)
        return tuple(_size(path) for path in files if path is not None)


@dataclass(frozen=True)
class Failure:
    """A sample that did not become part of a shard, as `failures.jsonl` keeps it."""

    key: str
    source: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """All samples of a source, sorted by key, and what could not be matched.

    `classes` names the label classes, background first; empty where there are no labels.
    """

    items: Sequence[Item]
    failures: Sequence[Failure] = ()
    classes: tuple[str, ...] = ()
    description: dict[str, str] = field(default_factory=dict)


def unique_keys(items: Sequence[FileItem]) -> tuple[list[FileItem], list[Failure]]:
    """Gives every item a safe key; items that share one all fail, none is silently the winner."""
    by_key: dict[str, list[FileItem]] = {}
    for item in items:
        by_key.setdefault(safe_key(item.key), []).append(item)
    kept, failures = [], []
    for key, same in sorted(by_key.items()):
        if len(same) == 1:
            kept.append(replace(same[0], key=key))
            continue
        names = ", ".join(sorted(item.source for item in same))
        failures += [
            Failure(key, item.source, "match", f"duplicate stem: {names}") for item in same
        ]
    return kept, failures


def read_class_names(path: Path) -> tuple[str, ...]:
    """Reads class names, one a line, background first; empty lines are passed over.

    Raises:
        InputError: the file cannot be read, or holds no name or more than 8-bit labels can say.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path}, the class names, cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}, the class names, is not UTF-8 text") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if not 1 <= len(names) <= IGNORE:
        raise InputError(
            f"{path} names {len(names)} classes; expected one name a line, 1 to {IGNORE} of them"
        )
    return names


def _read(path: Path, stage: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(stage, f"{path} cannot be read ({error.strerror})") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
