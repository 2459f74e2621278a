"""Tars in WebDataset's form, as they are: nothing is unpacked, members are read in place.

Neighbouring members that share a name up to its first dot are one sample; what follows the dot is
the component: `dog/0001.jpg`, `dog/0001.mask.png`, `dog/0001.json`.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sample import RawSample
from data_pipeline.sources.item import Failure, Listing
from data_pipeline.sources.tar_members import Member, TarDamage, scan_members
from data_pipeline.storage import Location, as_location, file_system

IMAGE_COMPONENTS = "jpg;jpeg;png;webp"
MAX_COMPONENT = 1 << 30  # bytes; a larger one is no picture
_MAX_TARS = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_GLOB = re.compile(r"[*?[]")

Extent = tuple[int, int]


@dataclass(frozen=True)
class TarItem:
    """One sample in a tar: places (offset, size) of its components there."""

    key: str
    source: str
    tar: Location
    image: Extent
    mask: Extent | None
    label: Extent | None

    def read(self) -> RawSample:
        return RawSample(
            _read_extent(self.tar, self.image, "image"),
            None if self.mask is None else _read_extent(self.tar, self.mask, "mask"),
            None if self.label is None else _read_extent(self.tar, self.label, "label"),
        )

    def sizes(self) -> tuple[int, ...]:
        return tuple(extent[1] for extent in (self.image, self.mask, self.label) if extent)


@dataclass(frozen=True)
class Components:
    """Names of the components that are read; `None` where there is none."""

    image: tuple[str, ...]
    mask: str | None
    label: str | None


def list_tars(
    tars: Sequence[str],
    image_ext: str = IMAGE_COMPONENTS,
    mask_ext: str = "mask.png",
    label_ext: str = "label.png",
    classes: tuple[str, ...] = (),
) -> Listing:
    """Lists the samples of tars.

    Keys are only names: a member called `/etc/passwd.jpg` or `../a.jpg` is read from the tar as any
    other. Of a tar that is cut off or damaged, the samples before that place are listed.

    Args:
        tars: paths or addresses, with braces (`shard-{000..012}.tar`) and wild cards.
        image_ext: components that are images, separated by `;`.
        mask_ext: component that is the mask; a sample without it is a failure. Empty: no masks.
        label_ext: component that is the label; a sample without it is a failure.
        classes: names of the label classes, background first; empty: no labels.

    Raises:
        InputError: no tar is there, or one that is named is not.
    """
    images = tuple(
        name.strip().lower().lstrip(".") for name in image_ext.split(";") if name.strip()
    )
    if not images:
        raise InputError("--image-ext is empty; give it component names as jpg;png")
    mask = mask_ext.lower().lstrip(".") or None
    label = label_ext.lower().lstrip(".") or None if classes else None
    found = [tar for pattern in tars for tar in _find(pattern)]
    if not found:
        raise InputError("no tar was given; name one at least, as shards/{000..012}.tar")
    description = {
        "source": "tars",
        "tars": " ".join(tars),
        "image_ext": ";".join(images),
        "mask_ext": mask or "",
        "label_ext": label or "",
    }
    roots = tuple(sorted({tar.parent for tar in found if isinstance(tar, Path)}))
    components = Components(images, mask, label)
    entries = (entry for tar in dict.fromkeys(found) for entry in _entries(tar, components))
    return Listing(entries, classes, description, roots)


# ---------------------------------------------------------------- which tars


def _find(pattern: str) -> Iterator[Location]:
    """Tars of one pattern, braces expanded, sorted where it has wild cards."""
    for number, each in enumerate(_expand(pattern)):
        if number >= _MAX_TARS:
            raise InputError(f"{pattern} names more than {_MAX_TARS:,} tars; check its braces")
        location = as_location(each)
        if not _GLOB.search(each):
            if not _exists(location):
                raise InputError(f"{each} is missing; check the path or the braces of {pattern}")
            yield location
            continue
        found: list[Location]
        if isinstance(location, Path):
            found = [path for path in map(Path, sorted(glob.glob(each))) if path.is_file()]
        else:
            system, path = file_system(location)
            scheme = location.partition("://")[0]
            found = [f"{scheme}://{str(name).lstrip('/')}" for name in sorted(system.glob(path))]
        if not found:
            raise InputError(f"{each} matches no file; check the path")
        yield from found


def _expand(pattern: str) -> Iterator[str]:
    """`a{08..10}{x,y}` to a08x, a08y, a09x, … as a shell does."""
    places = [found for form in (_RANGE, _CHOICE) if (found := form.search(pattern))]
    if not places:
        yield pattern
        return
    found = min(places, key=lambda each: each.start())
    head, tail = pattern[: found.start()], pattern[found.end() :]
    if found.re is _CHOICE:
        parts: Iterator[str] = iter(found[1].split(","))
    else:
        first, last = int(found[1]), int(found[2])
        step = 1 if first <= last else -1
        width = len(found[1]) if found[1].startswith("0") or found[2].startswith("0") else 0
        parts = (f"{number:0{width}d}" for number in range(first, last + step, step))
    for part in parts:
        yield from _expand(head + part + tail)


def _exists(location: Location) -> bool:
    if isinstance(location, Path):
        return location.is_file()
    system, path = file_system(location)
    return bool(system.exists(path))


# ---------------------------------------------------------------- what is in them


def _entries(tar: Location, components: Components) -> Iterator[TarItem | Failure]:
    name = tar.name if isinstance(tar, Path) else tar.rpartition("/")[2]
    try:
        with _open(tar) as (file, size):
            members = _Members(scan_members(file, size))
            for key, group in groupby(members, key=lambda member: _split_name(member.name)[0]):
                yield _sample(tar, f"{name}:{key}", key, list(group), components)
            if members.damage:
                yield Failure(name, str(tar), "read", members.damage)
    except OSError as error:
        yield Failure(name, str(tar), "read", f"cannot be read ({error.strerror or error})")


class _Members:
    """Members of a tar, one after the other, up to where it is damaged; what was wrong there."""

    def __init__(self, members: Iterator[Member]) -> None:
        self.members = members
        self.damage = ""

    def __iter__(self) -> Iterator[Member]:
        try:
            yield from self.members
        except TarDamage as error:
            self.damage = str(error)


def _split_name(name: str) -> tuple[str, str]:
    """Key and component: the file's name is cut at its first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, component = base.partition(".")
    return folder + slash + stem, component.lower()


def _sample(
    tar: Location, source: str, key: str, members: list[Member], components: Components
) -> TarItem | Failure:
    """What neighbouring members of one key make."""
    extents: dict[str, Extent] = {}
    wanted = {*components.image, components.mask, components.label}
    for member in members:
        component = _split_name(member.name)[1]
        if component not in wanted:
            continue
        problem = member.refused and f"its {component} is {member.refused}"
        if component in extents:
            problem = f"its {component} is there twice"
        elif member.size > MAX_COMPONENT:
            problem = f"its {component} has {member.size:,} bytes"
        if problem:
            return Failure(key, source, "match", problem)
        extents[component] = (member.offset, member.size)
    images = [name for name in components.image if name in extents]
    if len(images) != 1:
        present = ", ".join(_split_name(member.name)[1] for member in members[:8])
        several = f"several images: {', '.join(images)}"
        reason = several if images else f"no image among its components {present}"
        return Failure(key, source, "match", reason)
    for what in (components.mask, components.label):
        if what is not None and what not in extents:
            return Failure(key, source, "match", f"no {what} beside its {images[0]}")
    mask, label = (extents[n] if n else None for n in (components.mask, components.label))
    return TarItem(key, source, tar, extents[images[0]], mask, label)


@contextmanager
def _open(tar: Location) -> Iterator[tuple[IO[bytes], int]]:
    if isinstance(tar, Path):
        with tar.open("rb") as local:
            yield local, os.fstat(local.fileno()).st_size
    else:
        system, path = file_system(tar)
        with system.open(path, "rb") as remote:
            yield remote, int(remote.size)


def _read_extent(tar: Location, extent: Extent, stage: str) -> bytes:
    offset, size = extent
    try:
        if isinstance(tar, Path):
            with tar.open("rb") as file:
                data = os.pread(file.fileno(), size, offset)
        else:
            system, path = file_system(tar)
            data = system.cat_file(path, start=offset, end=offset + size)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SampleError(stage, f"{tar} cannot be read ({reason})") from None
    if len(data) != size:
        raise SampleError(stage, f"{tar} has become shorter since it was listed")
    return data
