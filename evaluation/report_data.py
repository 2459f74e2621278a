"""What the report reads: results, metrics, examples; of any folder, and untrusted all of it."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from evaluation.datasets import DATA_SETS
from evaluation.gallery import load_arrays
from evaluation.palettes import MAX_CLASSES, VOID
from evaluation.photographs.record import FOLDER as CLUSTERS
from evaluation.report_figures import Metrics, number
from evaluation.result import title_of

MAX_EXAMPLES = 12
PHOTOGRAPHS = "Your photographs"  # in the place of a data set's name
MAX_RESULTS = 400  # files that are read of one folder
_SHARED = ("size", "images", "resize")  # options of all protocols; `images` says which ones
_MAX_JSON = 64 << 20  # bytes


@dataclass(frozen=True)
class Evaluation:
    """One result file, checked; scores in percent.

    Attributes:
        data_set: its folder, empty for shards.
        protocol, network, measure: as in `result.Result`.
        step, foreground_iou, pixel_accuracy, images, seconds: None where they were not written.
        values: finite ones, of `measure`, one for each seed.
        metrics: further figures.
        published: value, what it is of, and the figure.
        classes, iou, pixels: names; IoU, None where absent; pixels of the truth.
        confusion: int64 [C, C], truth by prediction.
        unmatched: int64 [C], pixels of each true class that were predicted as no class.
        options: that decide the figures.
        note: in what the rows of its data set are not alike (`tell_apart`).
    """

    data_set: str
    protocol: str
    network: str
    measure: str
    step: float | None
    foreground_iou: float | None
    pixel_accuracy: float | None
    images: float | None
    seconds: float | None
    values: list[float]
    metrics: dict[str, list[float]]
    published: list[tuple[float, str, str]]
    classes: list[str]
    iou: list[float | None]
    pixels: list[float]
    confusion: NDArray[np.int64]
    unmatched: NDArray[np.int64]
    options: dict[str, Any]
    note: str = ""

    @property
    def title(self) -> str:
        title = title_of(self.protocol)
        return title[:1].upper() + title[1:] + (f", {self.note}" if self.note else "")

    @property
    def set_title(self) -> str:
        return data_set_title(self.data_set)

    @property
    def mean(self) -> float | None:
        return float(np.mean(self.values)) if self.values else None

    @property
    def std(self) -> float | None:
        """Over seeds; None for fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


def data_set_title(name: str) -> str:
    """A data set's name for people; its own where it is not known."""
    return DATA_SETS[name].title if name in DATA_SETS else name


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where the file is missing."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError("too large")
        payload = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); write it again") from error
    if not isinstance(payload, dict):
        raise InputError(f"{path}: expected a JSON object; write the file again")
    return payload


def read_metrics(path: Path) -> tuple[Metrics, int]:
    """Lines of metrics.jsonl by rising step, and how many lines were unreadable.

    A killed run leaves a torn line, and a resumed one repeats steps: the later line counts.
    """
    if not path.is_file():
        return [], 0
    by_step: dict[float, dict[str, Any]] = {}
    torn = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        step = number(entry.get("step")) if isinstance(entry, dict) else None
        if step is None:
            torn += 1
        else:
            by_step[step] = by_step.get(step, {}) | entry  # an evaluation has its own row
    return [by_step[step] for step in sorted(by_step)], torn


def data_set_folders(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each data set below evaluation/; that of shards, first, has no name."""
    base = folder / "evaluation"
    if base.is_dir():
        yield "", base
        yield from ((path.name, path) for path in sorted(base.iterdir()) if path.is_dir())


def picture_folders(folder: Path) -> Iterator[tuple[str, Path]]:
    """As `data_set_folders`, and the clusters of unlabelled photographs, called PHOTOGRAPHS."""
    yield from data_set_folders(folder)
    if (folder / CLUSTERS).is_dir():
        yield PHOTOGRAPHS, folder / CLUSTERS


def require_results(folder: Path) -> None:
    """Raises InputError for a folder that is neither a run nor holds results."""
    parts = ("config.yaml", "evaluation", CLUSTERS)
    if not any((folder / part).exists() for part in parts):
        raise InputError(
            f"{folder}: no config.yaml and no evaluation/, so not a run and no results; give the "
            "directory of a run, or the --output of an evaluation"
        )


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Every result below `folder`: K-means and the linear classifier first of each data set."""
    found = [
        read_evaluation(path, name)
        for name, place in data_set_folders(folder)
        for path in sorted(place.glob("*.json"))[:MAX_RESULTS]
    ]
    usual = {"kmeans": 0, "linear": 1}
    found.sort(key=lambda e: (e.data_set, usual.get(e.protocol, 2), e.protocol, e.network))
    return tell_apart(found[:MAX_RESULTS])


def tell_apart(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Notes on each what not all of a data set share: the size, the images, how they are resized.

    Where only some say it, as results of earlier versions do not, nothing is noted.
    """
    noted = []
    for one in evaluations:
        alike = [other for other in evaluations if other.data_set == one.data_set]
        words = []
        for name in _SHARED:
            values = [str(other.options.get(name)) for other in alike]
            if len(set(values)) > 1 and "None" not in values and f"{name}=" not in one.protocol:
                words.append(f"{name} {str(one.options[name])[:60]}")
        noted.append(replace(one, note=", ".join(words)))
    return noted


def read_evaluation(path: Path, data_set: str = "") -> Evaluation:
    """One PROTOCOL-NETWORK.json, checked.

    Raises:
        InputError: it is torn, holds something else, or belongs to another name.
    """
    payload = read_json_object(path) or {}
    try:
        protocol, network = str(payload["protocol"]), str(payload["network"])
        if path.stem != f"{protocol}-{network}":
            raise InputError(f"{path}: holds {protocol}-{network}; evaluate again")
        miou, per_class = payload["miou"], payload["per_class"]
        confusion = np.array(payload["confusion"], dtype=np.int64)
        if confusion.shape != (len(per_class), len(per_class)):
            raise ValueError(f"confusion is {confusion.shape} for {len(per_class)} classes")
        unmatched = np.array(payload.get("unmatched") or np.zeros(len(per_class)), dtype=np.int64)
        if unmatched.shape != (len(per_class),):
            raise ValueError(f"unmatched is {unmatched.shape} for {len(per_class)} classes")
        metrics = dict(payload.get("metrics") or {})
        values = _finite(miou.get("values") or [miou["mean"]])
        scalars = ("step", "foreground_iou", "pixel_accuracy", "images", "seconds")
        return Evaluation(
            data_set=data_set,
            protocol=protocol,
            network=network,
            measure=str(payload.get("measure") or "mIoU"),
            **{name: number(payload.get(name)) for name in scalars},
            values=values,
            metrics={str(name): _finite(each) for name, each in metrics.items()},
            published=_published(payload.get("published") or []),
            classes=[str(entry["class"]) for entry in per_class],
            iou=[number(entry.get("iou")) for entry in per_class],
            pixels=[number(entry.get("pixels")) or 0.0 for entry in per_class],
            confusion=confusion,
            unmatched=unmatched,
            options=dict(payload.get("options") or {}),
            note="",
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: {error!r}; run this evaluation again") from error


def _finite(values: Sequence[object]) -> list[float]:
    return [value for value in map(number, values) if value is not None]


def _published(entries: Sequence[dict[str, Any]]) -> list[tuple[float, str, str]]:
    figures = [(number(e["value"]), str(e["what"]), str(e.get("metric"))) for e in entries]
    return [(value, what, metric) for value, what, metric in figures if value is not None]


def read_examples(path: Path) -> dict[str, NDArray[Any]] | None:
    """Arrays of an examples file, at most MAX_EXAMPLES of them; None where it is missing."""
    if not path.is_file():
        return None
    wanted = {"image": 4, "embedding_rgb": 4, "mask": 3, "saliency": 3, "clusters": 3, "label": 3}
    try:
        loaded = load_arrays(path, ("key", *wanted))
        arrays = {name: array[:MAX_EXAMPLES] for name, array in loaded.items()}
        square = arrays["image"].shape[:3]
        for name, axes in wanted.items():
            shape = square + ((3,) if axes == 4 else ())
            kind = {"saliency": "f", "label": "i", "clusters": "i"}.get(name, "u")
            if arrays[name].shape != shape or arrays[name].dtype.kind != kind:
                raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
        if arrays["key"].shape != square[:1]:
            raise ValueError(f"{arrays['key'].size} keys for {square[0]} images")
        for name in ("label", "clusters"):
            require_classes(arrays[name], name)
    except (OSError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: {error}; write the examples again") from error
    return arrays


def require_classes(segments: NDArray[Any], name: str) -> None:
    """Raises ValueError where a value is neither a class nor void."""
    if ((segments < VOID) | (segments >= MAX_CLASSES - 1)).any():
        raise ValueError(f"{name} has values that are no class")
