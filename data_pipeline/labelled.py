"""Labelled samples for evaluation, by number: of shards, or of a data set in its own layout."""

from collections.abc import Sequence
from typing import Protocol

from data_pipeline.errors import InputError, SampleError
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import Manifest, require_component
from data_pipeline.reader import SampleReader
from data_pipeline.sample import IMAGE_COMPONENTS, LABEL, MASK, Policy, StoredSample, pack_sample
from data_pipeline.sources.item import Failure, Item, Listing

_SHOWN = 3  # failures that a message names


class LabelledSet(Protocol):
    """Images with labels, numbered from 0 on."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, background first."""
        ...

    def __len__(self) -> int: ...

    def __str__(self) -> str:
        """Where it is, for messages."""
        ...

    def key(self, number: int) -> str:
        """Name of a sample."""
        ...

    def read(self, number: int) -> StoredSample:
        """Encoded image, mask (where there is one) and label, in the form that shards have.

        Raises:
            SampleError: it cannot be read.
        """
        ...

    def remedy(self) -> str:
        """What a user can do about a sample that cannot be read."""
        ...


class ShardSet:
    """The samples of shards; `labelled_shards` checks that they have labels."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._reader = SampleReader(DatasetIndex(manifest))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    def __len__(self) -> int:
        return self.manifest.samples

    def __str__(self) -> str:
        return str(self.manifest)

    def key(self, number: int) -> str:
        return self._reader.index.key(*self._reader.index.locate(number))

    def read(self, number: int) -> StoredSample:
        found = self._read(number, label=True)
        if found.label is None:
            name = self._reader.describe(*self._reader.index.locate(number))
            raise SampleError("label", f"{self.manifest.root / name} has no label")
        return found

    def _read(self, number: int, label: bool) -> StoredSample:
        shard, sample = self._reader.index.locate(number)
        try:
            return self._reader.read(shard, sample, label=label)
        except SampleError as error:
            raise SampleError(error.stage, f"{self.manifest.root / error.reason}") from None

    def remedy(self) -> str:
        return "copy the shard here again or build the shards again"


class UnlabelledShards(ShardSet):
    """The samples of shards without labels, or regardless of them: every pixel is of one class."""

    @property
    def classes(self) -> tuple[str, ...]:
        return ("unlabelled",)

    def read(self, number: int) -> StoredSample:
        return self._read(number, label=False)


def labelled_shards(manifest: Manifest) -> ShardSet:
    """Shards to evaluate on.

    Raises:
        InputError: a sample has no label, or the classes have no names.
    """
    require_component(manifest, "label", "evaluation")
    _require_classes(manifest.classes, str(manifest), "build the shards again with")
    return ShardSet(manifest)


class ListedSet:
    """The samples of a data set where it lies, checked and brought into form as for shards.

    Args:
        listing: of a source, with labels.
        where: the data set's folder.

    Raises:
        InputError: files are missing, or nothing is listed.
    """

    def __init__(self, listing: Listing, where: object) -> None:
        _require_classes(listing.classes, str(where), "give a split that has labels, and")
        self._classes, self._where = listing.classes, str(where)
        items: list[Item] = []
        failures: list[Failure] = []
        for entry in listing.entries:
            if isinstance(entry, Failure):
                failures.append(entry)
            else:
                items.append(entry)
        if failures:
            shown = "; ".join(f"{one.key}: {one.reason}" for one in failures[:_SHOWN])
            raise InputError(
                f"{where}: {len(failures):,} of {len(failures) + len(items):,} samples are "
                f"incomplete, and evaluation needs every one: {shown}"
                f"{' …' if len(failures) > _SHOWN else ''}; complete the data set"
            )
        if not items:
            raise InputError(f"{where} lists no sample; check --root and the split")
        self._items: Sequence[Item] = items

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def __len__(self) -> int:
        return len(self._items)

    def __str__(self) -> str:
        return self._where

    def key(self, number: int) -> str:
        return self._items[number].key

    def read(self, number: int) -> StoredSample:
        item = self._items[number]
        try:
            packed = pack_sample("sample", item.source, item.read(), Policy(), len(self._classes))
        except OSError as error:
            raise SampleError("read", f"{item.source}: {error}") from None
        except SampleError as error:
            raise SampleError(error.stage, f"{self._where}/{item.source}: {error}") from None
        parts = packed.components
        if LABEL not in parts:
            raise SampleError("label", f"{self._where}/{item.source} has no label")
        image = next(parts[name] for name in IMAGE_COMPONENTS if name in parts)
        return StoredSample(image, parts.get(MASK), parts[LABEL])

    def remedy(self) -> str:
        return "unpack the data set again, or take the one that the labels belong to"


def _require_classes(classes: tuple[str, ...], where: str, remedy: str) -> None:
    if len(classes) < 2:
        raise InputError(f"{where} names no classes besides background; {remedy} class names")
