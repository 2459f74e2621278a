"""`manifest.json`: which shards a data set has, their counts, sizes and checksums."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write, encode_json, read_json

FORMAT = "maskbank-shards"
VERSION = 1
FILE_NAME = "manifest.json"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")
_REMEDY = "copy it here again or build the shards again"


@dataclass(frozen=True)
class ShardEntry:
    """One shard: tar name, samples, samples with a mask and a label, bytes, and checksums."""

    name: str
    samples: int
    masks: int
    labels: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A data set of shards in the folder `root`."""

    root: Path
    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...]
    failures: int
    configuration: dict[str, Any]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def encode(self) -> bytes:
        """The bytes of `manifest.json`."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "samples": self.samples,
            "bytes": self.bytes,
            "failures": self.failures,
            "classes": list(self.classes),
            "configuration": self.configuration,
            "shards": [asdict(shard) for shard in self.shards],
        }
        return encode_json(value, indent=1) + b"\n"

    def write(self) -> None:
        with atomic_write(self.root / FILE_NAME) as file:
            file.write(self.encode())


def read_manifest(root: Path | str, check_files: bool = True) -> Manifest:
    """Reads and checks the manifest of a folder of shards.

    Every shard must be there in the size that the manifest says; contents are checked on reading.

    Raises:
        InputError: no manifest, one of another program or version, or shards that do not fit it.
    """
    root = Path(root)
    path = root / FILE_NAME
    if not path.is_file():
        raise InputError(
            f"{root} holds no {FILE_NAME}, so it is no finished set of shards; "
            "make one with `maskbank shards build`, or run an interrupted build again"
        )
    value = read_json(path, "manifest", _REMEDY)
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise InputError(
            f"{path} is of format {value.get('format')!r} version {value.get('version')!r}; "
            f"this maskbank reads {FORMAT!r} version {VERSION}: build the shards again"
        )
    try:
        manifest = Manifest(
            root,
            tuple(_shard_entry(shard) for shard in value["shards"]),
            tuple(str(name) for name in value["classes"]),
            int(value["failures"]),
            dict(value["configuration"]),
        )
    except KeyError as error:
        raise InputError(f"{path} is damaged: it lacks {error}; {_REMEDY}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}; {_REMEDY}") from None
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) < len(names):
        raise InputError(f"{path} is damaged: it lists one shard twice; {_REMEDY}")
    for shard in manifest.shards if check_files else ():
        _check_shard(root, shard)
    if manifest.samples == 0:
        raise InputError(f"{path} lists no sample; build the shards again")
    return manifest


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


def _shard_entry(value: dict[str, Any]) -> ShardEntry:
    """Raises TypeError or ValueError for a value of the wrong kind."""
    entry = ShardEntry(**value)
    for field in fields(entry):
        found = getattr(entry, field.name)
        if type(found) is not field.type or (isinstance(found, int) and found < 0):
            raise ValueError(f"shard {entry.name!r} has {field.name} {found!r}")
    if not _SHARD_NAME.fullmatch(entry.name):  # also keeps the name inside the folder
        raise ValueError(f"it names the shard {entry.name!r}, expected NAME.tar")
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
