"""`manifest.json`: which shards a data set has, their counts, sizes and checksums."""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from data_pipeline.cache import DEFAULT_GIB, ShardCache, open_cache
from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write, encode_json, parse_json, read_json
from data_pipeline.storage import is_remote

FORMAT = "maskbank-shards"
VERSION = 1
FILE_NAME = "manifest.json"
FAILURES = "failures.jsonl"  # beside it: what did not become part of a shard

SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")
_INDEX_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "copy it here again or build the shards again"
_BLOCK = 1 << 20
_THREADS = 16
Data = bytes  # in `Manifest`, that name is a count


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a data set.

    Attributes:
        name: of the tar.
        samples, masks, labels: how many samples, and how many of them have a mask and a label.
        bytes, sha256: of the tar.
        index_sha256: of the index.
        index: file name of the index, that of the tar with `.json` unless samples were
            quarantined.
        quarantined: samples of the tar that the index leaves out.
    """

    name: str
    samples: int
    masks: int
    labels: int
    bytes: int
    sha256: str
    index_sha256: str
    index: str = ""
    quarantined: int = 0

    def __post_init__(self) -> None:
        if not self.index:  # frozen, hence this way
            object.__setattr__(self, "index", self.stem + ".json")

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".tar")

    @property
    def records(self) -> str:
        """File name of the index as records of one size; it holds the checksum of the index."""
        return self.index.removesuffix(".json") + ".records"


@dataclass(frozen=True)
class DroppedShard:
    """A shard that was quarantined as a whole: what it was, and its place among all shards."""

    place: int
    entry: ShardEntry


@dataclass(frozen=True)
class Manifest:
    """A data set of shards in the folder `root`, or at the address that `cache` copies from."""

    root: Path
    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...]
    failures: int
    configuration: dict[str, Any]
    dropped: tuple[DroppedShard, ...] = ()
    cache: ShardCache | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return str(self.root) if self.cache is None else self.cache.address

    def shard_path(self, shard: ShardEntry) -> Path:
        """Where the tar of a shard is read: OSError where it cannot be downloaded."""
        if self.cache is None:
            return self.root / shard.name
        return self.cache.local(shard.name, shard.sha256)

    def index_path(self, shard: ShardEntry) -> Path:
        """Where the index of a shard is read: OSError where it cannot be downloaded."""
        if self.cache is None:
            return self.root / shard.index
        return self.cache.local(shard.index, shard.index_sha256)

    def records_path(self, shard: ShardEntry) -> Path:
        """Where the records of a shard are read: OSError where they cannot be downloaded."""
        if self.cache is None:
            return self.root / shard.records
        return self.cache.local(shard.records, shard.index_sha256, derived=True)

    def forget_records(self, shard: ShardEntry) -> None:
        """A copy of records that are damaged is downloaded again the next time."""
        if self.cache is not None:
            self.cache.forget(shard.records, shard.index_sha256)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def encode(self) -> Data:
        """The file's bytes: JSON with a checksum over everything else in it."""
        value: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "samples": self.samples,
            "bytes": self.bytes,
            "failures": self.failures,
            "classes": list(self.classes),
            "configuration": self.configuration,
            "shards": [asdict(shard) for shard in self.shards],
        }
        if self.dropped:
            value["dropped"] = [asdict(shard) for shard in self.dropped]
        value["sha256"] = _checksum(value)
        return encode_json(value, indent=1) + b"\n"

    def write(self) -> None:
        with atomic_write(self.root / FILE_NAME) as file:
            file.write(self.encode())


def read_manifest(
    root: Path | str,
    check_files: bool = True,
    cache_folder: Path | None = None,
    cache_gib: float = DEFAULT_GIB,
    name: str = FILE_NAME,
) -> Manifest:
    """Reads and checks the manifest of a folder of shards.

    Args:
        root: the folder, or an address such as `s3://bucket/shards`.
        check_files: every shard must be there in the size that the manifest says; without it they
            are not looked at (see `missing_shards`). Contents are checked on reading, and what
            is elsewhere only then.
        cache_folder, cache_gib: where files of an address are kept, and how much of them.
        name: of the manifest, in the folder.

    Raises:
        InputError: no manifest, one of another program or version, or shards that do not fit it.
    """
    cache = None
    if is_remote(root):
        cache = open_cache(str(root), cache_folder, cache_gib)
        path = f"{cache.address}/{FILE_NAME}"
        value = parse_json(cache.read(FILE_NAME), path, "manifest", _REMEDY)
        root = cache.folder
    else:
        root = Path(root)
        path = str(root / name)
        if not Path(path).is_file():
            raise InputError(
                f"{root} holds no {name}, so it is no finished set of shards; "
                "make one with `maskbank shards build`, or run an interrupted build again"
            )
        value = read_json(Path(path), "manifest", _REMEDY)
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise InputError(
            f"{path} is of format {value.get('format')!r} version {value.get('version')!r}; "
            f"this maskbank reads {FORMAT!r} version {VERSION}: build the shards again"
        )
    if "sha256" in value and value["sha256"] != _checksum(value):
        raise InputError(f"{path} is damaged or was edited: its checksum differs; {_REMEDY}")
    try:
        manifest = replace(_parse(root, value), cache=cache)
    except KeyError as error:
        raise InputError(f"{path} is damaged: it lacks {error}; {_REMEDY}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is damaged: {error}; {_REMEDY}") from None
    for shard in manifest.shards if check_files and cache is None else ():
        _check_shard(root, shard)
    if manifest.samples == 0:
        raise InputError(f"{path} lists no sample; build the shards again")
    return manifest


def missing_shards(manifest: Manifest) -> str | None:
    """What to tell of shards that are missing or of another size; `None` where all are there.

    Raises:
        InputError: not one shard is there.
    """
    if manifest.cache is not None:
        return None  # told when they are downloaded
    with ThreadPoolExecutor(_THREADS) as pool:  # network disks answer many requests at a time
        sizes = list(pool.map(lambda part: _sizes(manifest, part), range(_THREADS)))
    found = [pair for part in sizes for pair in part]
    missing = sum(size < 0 for size, _ in found)
    changed = sum(size >= 0 and size != expected for size, expected in found)
    total = len(manifest.shards)
    if missing == total:
        raise InputError(_none_there(manifest))
    if not missing and not changed:
        return None
    return (
        f"of {total:,} shards in {manifest.root} {missing:,} are missing and {changed:,} have "
        "another size than the manifest says; samples that cannot be read are replaced by others: "
        f"run `maskbank shards verify {manifest.root}`"
    )


def require_a_shard(manifest: Manifest) -> None:
    """InputError where not one shard is there; one look where the first is."""
    if manifest.cache is None and not any(
        (manifest.root / shard.name).exists() for shard in manifest.shards
    ):
        raise InputError(_none_there(manifest))


def _none_there(manifest: Manifest) -> str:
    return (
        f"not one of the {len(manifest.shards):,} shards that the manifest lists is in "
        f"{manifest.root}; copy them here again or build the shards again"
    )


def _sizes(manifest: Manifest, part: int) -> list[tuple[int, int]]:
    """Bytes of every 16th shard, -1 where it is missing, and what they should be."""
    found = []
    for shard in manifest.shards[part::_THREADS]:
        try:
            size = os.stat(f"{manifest.root}/{shard.name}").st_size
        except OSError:
            size = -1
        found.append((size, shard.bytes))
    return found


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex; holds one block of it at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def require_component(manifest: Manifest, component: str, purpose: str) -> None:
    """Raises InputError, naming the first shard, unless every sample has a mask (or label)."""
    for shard in manifest.shards:
        present = shard.masks if component == "mask" else shard.labels
        if present < shard.samples:
            raise InputError(
                f"{manifest.root / shard.name}: {shard.samples - present} of {shard.samples} "
                f"samples have no {component}, which {purpose} needs; "
                f"build the shards again with --{component}s"
            )


def _checksum(value: dict[str, Any]) -> str:
    """SHA-256 over everything but the checksum itself, however the file is indented."""
    rest = {key: part for key, part in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _parse(root: Path, value: dict[str, Any]) -> Manifest:
    """Raises KeyError, TypeError or ValueError for a value that is missing or of the wrong kind."""
    manifest = Manifest(
        root,
        tuple(_shard_entry(shard) for shard in value["shards"]),
        tuple(str(name) for name in value["classes"]),
        int(value["failures"]),
        dict(value["configuration"]),
        tuple(
            DroppedShard(int(shard["place"]), _shard_entry(shard["entry"]))
            for shard in value.get("dropped", ())
        ),
    )
    entries = [*manifest.shards, *(shard.entry for shard in manifest.dropped)]
    for names in ([entry.name for entry in entries], [entry.index for entry in entries]):
        if len(set(names)) < len(names):
            raise ValueError("it lists one shard twice")
    return manifest


def _shard_entry(value: dict[str, Any]) -> ShardEntry:
    """Raises TypeError or ValueError for a value of the wrong kind."""
    entry = ShardEntry(**value)
    for each in fields(entry):
        found = getattr(entry, each.name)
        if type(found) is not each.type or (isinstance(found, int) and found < 0):
            raise ValueError(f"shard {entry.name!r} has {each.name} {found!r}")
    if not SHARD_NAME.fullmatch(entry.name):  # also keeps the name inside the folder
        raise ValueError(f"it names the shard {entry.name!r}, expected NAME.tar")
    if not _INDEX_NAME.fullmatch(entry.index) or entry.index == FILE_NAME:
        raise ValueError(f"it names the index {entry.index!r}, expected NAME.json")
    for checksum in (entry.sha256, entry.index_sha256):  # also part of names in a cache
        if not _SHA256.fullmatch(checksum):
            raise ValueError(f"shard {entry.name!r} has the checksum {checksum!r}")
    return entry


def _check_shard(root: Path, shard: ShardEntry) -> None:
    path = root / shard.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}), but the manifest lists it; {_REMEDY}"
        ) from None
    if size != shard.bytes:
        raise InputError(
            f"{path} has {size:,} bytes, the manifest says {shard.bytes:,}; it was cut short or "
            f"changed: {_REMEDY}"
        )
