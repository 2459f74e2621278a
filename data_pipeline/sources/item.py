"""The one form in which every source hands its samples to the shard writer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import SampleError
from data_pipeline.sample import RawSample, safe_key


class Item(Protocol):
    """One sample, not yet read. Picklable, since worker processes read it."""

    @property
    def key(self) -> str: ...

    @property
    def source(self) -> str: ...

    def read(self) -> RawSample:
        """Reads the bytes; raises SampleError or OSError when that fails."""
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
        by_key.setdefault(item.key, []).append(item)
    kept, failures = [], []
    for key in sorted(by_key):
        same = by_key[key]
        if len(same) == 1:
            only = same[0]
            kept.append(FileItem(safe_key(key), only.source, only.image, only.mask, only.label))
            continue
        names = ", ".join(sorted(item.source for item in same))
        failures += [
            Failure(key, item.source, "match", f"duplicate stem: {names}") for item in same
        ]
    return kept, failures


def _read(path: Path, stage: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(stage, f"{path} cannot be read ({error.strerror})") from None
