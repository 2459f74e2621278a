"""Contact sheets of the report: best and worst images, clusters, retrieved neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from evaluation.gallery import Gallery, read_gallery
from evaluation.report_clusters import display_names
from evaluation.report_data import (
    PHOTOGRAPHS,
    data_set_title,
    picture_folders,
    require_classes,
)
from evaluation.report_figures import css_colour, jpeg_data_uri, outlined
from evaluation.report_tables import network_order
from evaluation.result import title_of

MAX_SHEETS = 4  # of each kind
MAX_ROWS = 40  # clusters or queries of a sheet
MAX_MEMBERS = 8
MAX_EXTREMES = 8

CLUSTER_ARRAYS = {
    "miou": ("f", 1), "object_class": ("i", 1), "best": ("i", 1), "worst": ("i", 1),
    "clusters": ("i", 1), "cluster_class": ("i", 1), "cluster_iou": ("f", 1),
    "cluster_images": ("i", 1), "member": ("i", 2), "cluster_count": ("i", 0),
}  # fmt: skip
NEIGHBOUR_ARRAYS = {
    "query": ("i", 1), "neighbour": ("i", 2), "query_class": ("i", 1), "bank_class": ("i", 2),
    "similarity": ("f", 2),
}  # fmt: skip

Sheet = dict[str, Any]


def read_sheets(folder: Path) -> dict[str, list[Sheet]]:
    """The sheets below a folder of results, at most MAX_SHEETS of each kind."""
    return {
        "clusters": _read_kind(folder, "clusters-*.npz", CLUSTER_ARRAYS, cluster_sheet),
        "neighbours": _read_kind(folder, "neighbours-*.npz", NEIGHBOUR_ARRAYS, neighbour_sheet),
    }


def _read_kind(
    folder: Path, pattern: str, arrays: dict[str, tuple[str, int]], sheet: Callable[..., Sheet]
) -> list[Sheet]:
    paths = [(n, path) for n, place in picture_folders(folder) for path in place.glob(pattern)]
    networks = network_order(path.stem.rpartition("-")[2] for _, path in paths)
    # the trained network's before others, K-means before over-clustering
    paths.sort(
        key=lambda one: (
            networks.index(one[1].stem.rpartition("-")[2]), len(one[1].stem), one[0], one[1]
        )
    )  # fmt: skip
    return [_checked(path, name, arrays, sheet) for name, path in paths[:MAX_SHEETS]]


def _checked(
    path: Path, data_set: str, arrays: dict[str, tuple[str, int]], sheet: Callable[..., Sheet]
) -> Sheet:
    gallery = read_gallery(path, arrays)
    try:
        require_classes(gallery.segments, "segments")
        if data_set == PHOTOGRAPHS:
            gallery = replace(gallery, names=display_names(path.parent, gallery.names))
        said = {
            "labelled": data_set != PHOTOGRAPHS,
            "data_set": data_set_title(data_set),
            "protocol": title_of(gallery.protocol),
            "network": gallery.network,
        }
        return sheet(gallery) | said
    except (IndexError, ValueError) as error:
        raise InputError(f"{path}: {error}; evaluate again to write the pictures") from error


class _Pictures:
    """Pictures of a gallery as data URIs with the predicted outline, each made once."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self._made: dict[int, str] = {}

    def __getitem__(self, place: int) -> dict[str, Any]:
        if not 0 <= place < len(self.gallery.keys):
            raise ValueError(f"there is no picture {place}")
        if place not in self._made:
            image, segments = self.gallery.images[place], self.gallery.segments[place]
            self._made[place] = jpeg_data_uri(outlined(image, segments))
        return {"key": self.gallery.keys[place], "image": self._made[place]}


def class_title(index: int, names: Any) -> str:
    """A class by name; its number where there is none."""
    if index < 0:
        return "no class"
    return str(names[index]) if index < len(names) else f"class {index}"


def cluster_sheet(gallery: Gallery) -> Sheet:
    """What the page shows of `contact_sheets.write_cluster_sheet`."""
    arrays, names, pictures = gallery.arrays, gallery.names, _Pictures(gallery)
    _require_length(len(gallery.keys), miou=arrays["miou"], object_class=arrays["object_class"])
    rows = {n: arrays[n] for n in ("cluster_class", "cluster_iou", "cluster_images", "member")}
    _require_length(len(arrays["clusters"]), **rows)
    truth = arrays["object_class"].tolist()

    def extreme(place: int) -> dict[str, Any]:
        predicted = sorted({int(i) for i in np.unique(gallery.segments[place])} - {0})
        return pictures[place] | {
            "miou": _finite(arrays["miou"][place]),
            "predicted": ", ".join(class_title(i, names) for i in predicted) or "nothing",
            "truth": "no object" if truth[place] == 0 else class_title(truth[place], names),
        }

    def cluster(row: int) -> dict[str, Any]:
        index = int(arrays["cluster_class"][row])
        members = [i for i in arrays["member"][row][:MAX_MEMBERS].tolist() if i >= 0]
        return {
            "number": int(arrays["clusters"][row]),
            "name": class_title(index, names),
            "colour": css_colour(index),
            "iou": _finite(arrays["cluster_iou"][row]),
            "images": int(arrays["cluster_images"][row]),
            "members": [
                pictures[i] | {"right": truth[i] == index, "truth": class_title(truth[i], names)}
                for i in members
            ],
        }

    shown = min(MAX_ROWS, len(arrays["clusters"]))
    return {
        "best": [extreme(i) for i in arrays["best"][:MAX_EXTREMES].tolist()],
        "worst": [extreme(i) for i in arrays["worst"][:MAX_EXTREMES].tolist()],
        "clusters": [cluster(row) for row in range(shown)],
        "count": int(arrays["cluster_count"]),
    }


def neighbour_sheet(gallery: Gallery) -> Sheet:
    """What the page shows of `contact_sheets.write_neighbour_sheet`."""
    arrays, names, pictures = gallery.arrays, gallery.names, _Pictures(gallery)
    shape = arrays["neighbour"].shape
    for name in ("bank_class", "similarity"):
        if arrays[name].shape != shape:
            raise ValueError(f"{name} is {arrays[name].shape} for neighbours {shape}")
    _require_length(shape[0], query=arrays["query"], query_class=arrays["query_class"])

    def row(number: int) -> dict[str, Any]:
        truth = int(arrays["query_class"][number])
        near = zip(
            *(arrays[n][number].tolist() for n in ("neighbour", "bank_class", "similarity")),
            strict=True,
        )
        return pictures[int(arrays["query"][number])] | {
            "truth": "no object" if truth == 0 else class_title(truth, names),
            "neighbours": [
                pictures[place]
                | {"name": class_title(index, names), "right": index == truth, "cosine": cosine}
                for place, index, cosine in list(near)[:MAX_MEMBERS]
            ],
        }

    return {"rows": [row(number) for number in range(min(MAX_ROWS, shape[0]))]}


def _require_length(count: int, **arrays: NDArray[Any]) -> None:
    for name, array in arrays.items():
        if len(array) != count:
            raise ValueError(f"{name} has {len(array)} entries instead of {count}")


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
