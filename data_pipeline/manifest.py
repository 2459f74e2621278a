"""`manifest.json`: which shards a data set has, their counts, sizes and checksums."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import read_json, write_json

FORMAT = "maskbank-shards"
VERSION = 1
FILE_NAME = "manifest.json"


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

    def write(self) -> None:
        write_json(
            self.root / FILE_NAME,
            {
                "format": FORMAT,
                "version": VERSION,
                "samples": self.samples,
                "bytes": self.bytes,
                "failures": self.failures,
                "classes": list(self.classes),
                "configuration": self.configuration,
                "shards": [asdict(shard) for shard in self.shards],
            },
            indent=1,
        )


def read_manifest(root: Path | str) -> Manifest:
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
    value = read_json(path, "manifest")
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise InputError(
            f"{path} is of format {value.get('format')!r} version {value.get('version')!r}; "
            f"this maskbank reads {FORMAT!r} version {VERSION}: build the shards again"
        )
    try:
        manifest = Manifest(
            root,
            tuple(ShardEntry(**shard) for shard in value["shards"]),
            tuple(str(name) for name in value["classes"]),
            int(value["failures"]),
            dict(value["configuration"]),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}; build the shards again") from None
    for shard in manifest.shards:
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


def _check_shard(root: Path, shard: ShardEntry) -> None:
    if Path(shard.name).name != shard.name or not shard.name.endswith(".tar"):
        raise InputError(f"{root / FILE_NAME} names the shard {shard.name!r}; expected NAME.tar")
    path = root / shard.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}), but the manifest lists it; "
            "copy it here again or build the shards again"
        ) from None
    if size != shard.bytes:
        raise InputError(
            f"{path} has {size:,} bytes, the manifest says {shard.bytes:,}; it was cut short or "
            "changed: copy it here again or build the shards again"
        )
