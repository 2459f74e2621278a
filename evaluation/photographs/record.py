"""What a clustering of photographs leaves beside its head: counts, and why so many clusters."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import read_json, write_json
from evaluation.photographs.number_of_clusters import Silhouette

FOLDER = "clusters"  # of a run
HEAD = "head.safetensors"
RECORD = "clusters.json"
_MAX_CLUSTERS = 100_000


@dataclass(frozen=True)
class ClusterRecord:
    """Figures of a clustering.

    Attributes:
        network: its name: trained, initial, or that of a file.
        step: that it was trained for.
        photographs: that were read.
        without_object: of those.
        unreadable: that were left out.
        images: photographs of each cluster, [K].
        pixels: pixels of each cluster's objects, [K].
        all_pixels: of all photographs.
        curve: silhouettes that K was chosen from; empty where it was given.
        options: that decide the result.
    """

    network: str
    step: int
    photographs: int
    without_object: int
    unreadable: int
    images: tuple[int, ...]
    pixels: tuple[int, ...]
    all_pixels: int
    curve: tuple[Silhouette, ...]
    options: dict[str, Any]

    @property
    def clusters(self) -> int:
        return len(self.images)

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, asdict(self), indent=1)


def read_record(folder: Path) -> ClusterRecord | None:
    """Reads what `write` wrote into a run's folder of clusters; None where there is nothing.

    Raises:
        InputError: the file is something else.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    value = read_json(path, "the record of clusters", "run `maskbank cluster` again")
    try:
        record = ClusterRecord(
            network=str(value["network"]),
            **{name: int(value[name]) for name in _COUNTS},
            images=tuple(int(count) for count in value["images"]),
            pixels=tuple(int(count) for count in value["pixels"]),
            curve=tuple(
                Silhouette(int(one["clusters"]), float(one["mean"]), float(one["error"]))
                for one in value["curve"]
            ),
            options={str(name): each for name, each in dict(value["options"]).items()},
        )
        if not 1 <= record.clusters == len(record.pixels) <= _MAX_CLUSTERS:
            raise ValueError(f"{len(record.images)} and {len(record.pixels)} clusters")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: {error!r}; run `maskbank cluster` again") from None
    return record


_COUNTS = ("step", "photographs", "without_object", "unreadable", "all_pixels")
