"""Tables of the report: every number, classes, confusions, and what the training logged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.report_data import Evaluation, data_set_title
from evaluation.report_figures import Metrics, css_colour, number

MAX_CONFUSION = 30
MAX_CLASS_ROWS = 120  # of a data set; ImageNet-S has 920 classes
DETAILED = ("kmeans", "linear")  # protocols whose classes are shown
INITIAL = "initial"
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, and what there is to say about it."""

    mean: float
    std: float | None
    count: int


def figure_of(values: Sequence[float]) -> Figure | None:
    """Mean, sample standard deviation and number of values; None where there are none."""
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Figure(float(np.mean(values)), std, len(values))


def network_order(names: Iterable[str]) -> list[str]:
    """Networks as they are shown: the trained one, others by name, that before training last."""
    return sorted(set(names), key=lambda name: (name == INITIAL, name != "trained", name))


def by_row(evaluations: Iterable[Evaluation]) -> dict[Key, dict[str, Evaluation]]:
    """Evaluations by (data set, protocol, note), then network; in their order."""
    rows: dict[Key, dict[str, Evaluation]] = {}
    for one in evaluations:
        rows.setdefault((one.data_set, one.protocol, one.note), {})[one.network] = one
    return rows


def summary_rows(evaluations: list[Evaluation], networks: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each figure of each protocol and data set; cells follow `networks`."""
    rows: list[dict[str, Any]] = []
    for (data_set, _, _), of in by_row(evaluations).items():
        first = next(iter(of.values()))
        measures: dict[str, dict[str, Sequence[float]]] = {first.measure: {}}
        for network, one in of.items():
            for name, values in {one.measure: one.values, **one.metrics}.items():
                measures.setdefault(name, {})[network] = values
        for name, values_of in measures.items():
            rows.append(
                {
                    "data_set": data_set_title(data_set),
                    "title": first.title,
                    "measure": name,
                    "main": name == first.measure,
                    "cells": [figure_of(values_of.get(network, ())) for network in networks],
                    "published": [
                        (value, what) for value, what, metric in first.published if metric == name
                    ],
                }
            )
    return rows


def detailed(evaluations: list[Evaluation]) -> list[dict[str, Evaluation]]:
    """The protocols of one data set whose classes are shown, each by network; at least one."""
    rows = by_row(evaluations)
    chosen = [of for (_, protocol, _), of in rows.items() if protocol in DETAILED]
    return chosen or list(rows.values())[:1]


def main_network(of: dict[str, Evaluation]) -> Evaluation:
    """The trained network's evaluation, or else the first in `network_order`."""
    return of[network_order(of)[0]]


def class_rows(columns: list[dict[str, Evaluation]]) -> list[dict[str, Any]]:
    """IoU of every class in every column, trained and before; best in the first column on top."""
    if not columns:
        return []
    first = main_network(columns[0])
    scores = [
        (
            _iou_of([one for name, one in of.items() if name == main_network(of).network]),
            _iou_of([one for name, one in of.items() if name == INITIAL]),
        )
        for of in columns
    ]
    total = sum(first.pixels) or 1.0
    iou = first.iou
    order = sorted(range(len(iou)), key=lambda i: (iou[i] is None, -(iou[i] or 0.0)))
    return [
        {
            "name": first.classes[i],
            "colour": css_colour(i),
            "share": 100 * first.pixels[i] / total,
            "cells": [
                (
                    None if main_network(of).network == INITIAL else now.get(first.classes[i]),
                    before.get(first.classes[i]),
                )
                for of, (now, before) in zip(columns, scores, strict=True)
            ],
        }
        for i in order
    ]


def _iou_of(evaluations: list[Evaluation]) -> dict[str, float | None]:
    return {
        name: value for one in evaluations for name, value in zip(one.classes, one.iou, strict=True)
    }


def confusion_grid(evaluation: Evaluation) -> dict[str, Any]:
    """Row shares (percent) of the confusion matrix, of the MAX_CONFUSION largest classes."""
    counts = evaluation.confusion
    # pixels in clusters without a class are in no column, but part of their row
    totals = counts.sum(axis=1) + evaluation.unmatched
    kept = np.sort(np.argsort(-totals, kind="stable")[:MAX_CONFUSION])
    shares = (100 * counts / np.maximum(totals, 1)[:, None])[np.ix_(kept, kept)]
    names = [evaluation.classes[i] for i in kept]
    cells = [(row, column, shares[row, column]) for row, column in np.argwhere(shares >= 0.05)]
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])
    return {
        "evaluation": evaluation,
        "names": names,
        "cells": cells,
        "mistakes": [(names[row], names[column], share) for row, column, share in wrong[:5]],
        "hidden": len(evaluation.classes) - len(names),
    }


def class_groups(evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    """Class table and confusion matrices of each data set."""
    groups = []
    for name in dict.fromkeys(one.data_set for one in evaluations):
        columns = detailed([one for one in evaluations if one.data_set == name])
        rows = class_rows(columns)
        groups.append(
            {
                "title": data_set_title(name),
                "columns": [main_network(of) for of in columns],
                "rows": rows[:MAX_CLASS_ROWS],
                "hidden": max(0, len(rows) - MAX_CLASS_ROWS),
                "confusions": [confusion_grid(main_network(of)) for of in columns],
            }
        )
    return groups


def training_summary(entries: Metrics) -> dict[str, float | None]:
    """Latest and median values of the metrics, None where never logged."""
    summary: dict[str, float | None] = {}
    for key in ("step", "epoch", "loss", "seconds", "images_per_second", "data_wait", "memory_mb"):
        values = [v for v in (number(entry.get(key)) for entry in entries) if v is not None]
        summary[f"last_{key}"] = values[-1] if values else None
        summary[f"median_{key}"] = float(np.median(values)) if values else None
    return summary


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units: 2 h 05 min, 3 min 20 s, 12 s."""
    if seconds is None:
        return "not recorded"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
