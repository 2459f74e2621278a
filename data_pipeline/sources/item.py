"""The one form in which every source hands its samples to the shard writer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sample import IGNORE, RawSample
from data_pipeline.storage import Location, read_location, size_of


class Item(Protocol):
    """One sample, not yet read. Picklable, since worker processes read it."""

    @property
    def key(self) -> str:
        """Any name that tells it from the others: `plan.Plan` makes a safe key of it."""
        ...

    @property
    def source(self) -> str:
        """Where it comes from, for people: a path relative to the source's folder."""
        ...

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
    image: Location
    mask: Location | None
    label: Location | None

    def read(self) -> RawSample:
        return RawSample(
            _read(self.image, "image"),
            None if self.mask is None else _read(self.mask, "mask"),
            None if self.label is None else _read(self.label, "label"),
        )

    def __reduce__(self) -> tuple[type["FileItem"], tuple[str | None, ...]]:
        # as text: a million paths are made and read back for a plan
        files = (self.image, self.mask, self.label)
        paths = (None if path is None else str(path) for path in files)
        return type(self), (self.key, self.source, *paths)

    def sizes(self) -> tuple[int, ...]:
        files = (self.image, self.mask, self.label)
        return tuple(size_of(path) for path in files if path is not None)


@dataclass(frozen=True)
class FilesOfItem:
    """What samples have in common that read their files in a way of their own.

    Attributes:
        files: key, source, and where the bytes are.
    """

    files: FileItem

    @property
    def key(self) -> str:
        return self.files.key

    @property
    def source(self) -> str:
        return self.files.source

    def sizes(self) -> tuple[int, ...]:
        return self.files.sizes()


@dataclass(frozen=True)
class Failure:
    """A sample that did not become part of a shard, as `failures.jsonl` keeps it."""

    key: str
    source: str
    stage: str
    reason: str


def share_a_stem(sources: Sequence[str], more: bool = False) -> str:
    """Reason of samples that would have the same key or mask, with some of them by name."""
    names = ", ".join(sources) + (", …" if more else "")
    # what differs from case to case is in brackets, by which reasons are counted
    return f"duplicate stem: rename all but one, or give them folders of their own ({names})"


@dataclass(frozen=True)
class Listing:
    """All samples of a source, in any order, each found only as one iterates.

    Attributes:
        entries: samples, and in between what could not be matched. Iterated once.
        classes: names of the label classes, background first; empty where there are no labels.
        description: what decides the entries: a build that goes on compares it, key by key.
        roots: folders that must be there for any sample to be readable: where one vanishes during
            a build, that is no failure of the samples.
    """

    entries: Iterable[Item | Failure]
    classes: tuple[str, ...] = ()
    description: dict[str, Any] = field(default_factory=dict)
    roots: tuple[Path, ...] = ()


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


def _read(location: Location, stage: str) -> bytes:
    try:
        return read_location(location)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SampleError(stage, f"{location} cannot be read ({reason})") from None
