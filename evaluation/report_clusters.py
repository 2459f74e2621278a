"""What the report says about clusters of unlabelled photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.photographs.cluster_names import BACKGROUND, read_names
from evaluation.photographs.record import FOLDER, ClusterRecord, read_record
from evaluation.report_figures import chart, css_colour

_CURVE = (
    "silhouette",
    "Silhouette",
    "of each number of clusters; the dot is the one taken",
    1.0,
    "",
)
_MAX_ROWS = 200


def cluster_summary(folder: Path) -> dict[str, Any] | None:
    """The clusters below a run, None where there are none.

    Raises:
        InputError: a file there is damaged, or a name is of no cluster.
    """
    record = read_record(folder / FOLDER)
    if record is None:
        return None
    names = read_names(folder / FOLDER, record.clusters)
    with_object = record.photographs - record.without_object
    largest = max(record.images)
    rows = [
        {
            "name": name,
            "colour": css_colour(number),
            "images": images,
            "share": 100 * images / max(1, with_object),
            "of_largest": 100 * images / max(1, largest),
            "pixels": 100 * pixels / max(1, record.all_pixels),
        }
        for number, (name, images, pixels) in enumerate(
            zip(names, record.images, record.pixels, strict=True), 1
        )
    ]
    return {
        "count": record.clusters,
        "photographs": record.photographs,
        "with_object": with_object,
        "unreadable": record.unreadable,
        "rows": rows[:_MAX_ROWS],
        "hidden": max(0, len(rows) - _MAX_ROWS),
        "chosen": bool(record.curve),
        "curve": _curve(record),
        "options": record.options,
    }


def display_names(folder: Path, names: Sequence[str]) -> list[str]:
    """The names that people gave to the clusters whose pictures call their classes `names`."""
    return [BACKGROUND, *read_names(folder, len(names) - 1)]


def _curve(record: ClusterRecord) -> dict[str, Any] | None:
    if len(record.curve) < 2:
        return None
    entries = [{"step": one.clusters, "silhouette": one.mean} for one in record.curve]
    drawn = chart(entries, _CURVE)
    for one, point in zip(record.curve, drawn.get("hits", ()), strict=False):
        if one.clusters == record.clusters:  # marked in the place of the last one
            drawn |= {"end": (point["x"], point["y"]), "latest": f"{one.mean:.3f}"}
    return drawn
