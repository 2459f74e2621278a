"""One self-contained HTML page about a run or any folder of results: numbers, pictures, curves.

Everything read from the folder is untrusted text. The page is therefore written by an autoescaping
template, and values that reach an attribute of the drawing are numbers made here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import atomic_write
from data_pipeline.sample import IGNORE
from evaluation.palettes import VOID
from evaluation.report_clusters import cluster_summary
from evaluation.report_data import (
    MAX_EXAMPLES,
    PHOTOGRAPHS,
    Evaluation,
    data_set_title,
    picture_folders,
    read_evaluations,
    read_examples,
    read_json_object,
    read_metrics,
    require_results,
)
from evaluation.report_figures import (
    CHART,
    PROPOSAL_PALETTE,
    Segments,
    chart,
    css_colour,
    overlay,
    png_data_uri,
)
from evaluation.report_sheets import read_sheets
from evaluation.report_tables import (
    DETAILED,
    INITIAL,
    by_row,
    class_groups,
    duration,
    network_order,
    summary_rows,
    training_summary,
)

Examples = dict[str, dict[str, NDArray[Any]]]  # by network

NETWORK_TITLES = {"trained": "trained network", INITIAL: "untrained network"}
MAX_NETWORKS = 6  # columns of the page
MAX_PICTURED = 3  # data sets whose examples are shown
_TEMPLATES = Path(__file__).parent

# key in metrics.jsonl, title, what the reader sees in it, factor to the shown unit, unit
CURVES = (
    ("loss_contrastive", "Contrastive loss", "pixels against mask prototypes", 1.0, ""),
    ("loss_saliency", "Saliency loss", "object against background", 1.0, ""),
    ("accuracy", "Contrastive accuracy", "own mask ranked first", 100.0, "%"),
    ("lr", "Learning rate", "schedule of the optimiser", 1.0, ""),
    ("images_per_second", "Throughput", "training images a second", 1.0, ""),
    ("data_wait", "Waiting for data", "share of the step time", 100.0, "%"),
    ("positive_similarity", "Similarity to its own mask", "cosine, mean pixel", 1.0, ""),
    ("hardest_similarity", "Similarity to the nearest other", "cosine, mean pixel", 1.0, ""),
    ("bank_age", "Age of the memory bank", "mean entry, in steps", 1.0, ""),
    ("bank_same_image", "Bank entries of a pixel's own image", "false negatives", 100.0, "%"),
    ("bank_mb_received", "Bank traffic", "MB a rank and step", 1.0, ""),
    ("bank_wait_ms", "Waiting for the bank", "not hidden, ms a rank and step", 1.0, ""),
    ("kmeans_miou", "K-means mIoU while training", "mean of the seeds", 1.0, "%"),
    ("foreground_iou", "Foreground IoU while training", "predicted saliency", 1.0, "%"),
)


def example_rows(
    examples: Examples, classes: Sequence[str], networks: Sequence[str]
) -> list[dict[str, Any]]:
    """One entry a picture; what each network predicts for it is found by its key.

    Predictions are by the network's place in `networks`, since its name is text of a file.
    """
    rows: dict[str, dict[str, Any]] = {}
    for network, arrays in examples.items():
        for i, key in enumerate(map(str, arrays["key"])):
            image, mask = arrays["image"][i], arrays["mask"][i].astype(np.int16)
            mask = np.where(mask == IGNORE, VOID, mask)
            label, clusters = arrays["label"][i], arrays["clusters"][i]
            if key not in rows:
                rows[key] = {
                    "key": key,
                    "image": png_data_uri(image),
                    "mask": png_data_uri(overlay(image, mask, PROPOSAL_PALETTE, 0.45), 128),
                    "proposals": len(np.unique(mask[(mask != 0) & (mask != VOID)])),
                    "truth": png_data_uri(overlay(image, label), 128),
                    "classes": names_of(label, classes),
                    "predictions": {},
                }
            saliency = np.clip(np.nan_to_num(arrays["saliency"][i]), 0, 1) * 255
            rows[key]["predictions"][networks.index(network)] = {
                "saliency": png_data_uri(saliency.round().astype(np.uint8)),
                "clusters": png_data_uri(overlay(image, clusters), 128),
                "embedding": png_data_uri(arrays["embedding_rgb"][i]),
                "classes": names_of(clusters, classes),
            }
    return list(rows.values())[:MAX_EXAMPLES]


def class_name(index: int, classes: Sequence[str]) -> str:
    """Name of a class id, its number where no evaluation names it."""
    return classes[index] if index < len(classes) else f"class {index}"


def names_of(segments: Segments, classes: Sequence[str]) -> str:
    """Names of the objects in `segments` [H, W], for the text that stands for a picture."""
    ids = sorted({int(i) for i in np.unique(segments)} - {0, VOID})
    return ", ".join(class_name(i, classes) for i in ids) or "background only"


def legend(examples: Examples, classes: Sequence[str]) -> list[dict[str, str]]:
    """Colour and name of every class seen in the pictures; void last."""
    drawn = [arrays[name] for arrays in examples.values() for name in ("clusters", "label")]
    seen = {int(i) for segments in drawn for i in np.unique(segments)} - {0}
    return [
        {"colour": css_colour(i), "name": "void" if i == VOID else class_name(i, classes)}
        for i in sorted(seen)
    ]


def read_all_examples(folder: Path) -> dict[str, Examples]:
    """Examples by data set and network."""
    found: dict[str, Examples] = {}
    for name, place in picture_folders(folder):
        paths = {path.stem.partition("-")[2]: path for path in place.glob("examples-*.npz")}
        for network in network_order(paths)[:MAX_NETWORKS]:
            arrays = read_examples(paths[network])
            if arrays is not None:
                found.setdefault(name, {})[network] = arrays
    return found


def picture_groups(
    examples: dict[str, Examples],
    evaluations: list[Evaluation],
    networks: Sequence[str],
    cluster_names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Pictures of each data set, with the names of its classes."""
    groups = []
    for name, of in list(examples.items())[:MAX_PICTURED]:
        labelled = name != PHOTOGRAPHS
        known: Iterator[Sequence[str]] = (e.classes for e in evaluations if e.data_set == name)
        classes = next(known, []) if labelled else cluster_names
        groups.append(
            {
                "title": data_set_title(name),
                "labelled": labelled,
                "rows": example_rows(of, classes, networks),
                "legend": legend(of, classes),
            }
        )
    return groups


def page_context(folder: Path) -> dict[str, Any]:
    """All the template shows, from the files of `folder`."""
    require_results(folder)
    config = folder / "config.yaml"
    entries, torn = read_metrics(folder / "metrics.jsonl")
    evaluations = read_evaluations(folder)
    examples = read_all_examples(folder)
    clusters = cluster_summary(folder)
    cluster_names = ["background", *(row["name"] for row in clusters["rows"])] if clusters else []
    seen = [one.network for one in evaluations] + [n for of in examples.values() for n in of]
    networks = network_order(seen)[:MAX_NETWORKS]
    evaluations = [one for one in evaluations if one.network in networks]
    examples = {
        name: {network: arrays for network, arrays in of.items() if network in networks}
        for name, of in examples.items()
    }
    rows = by_row(evaluations)
    # of the first data set that has it
    headline = {
        p: next((of for (_, name, _), of in rows.items() if name == p), {}) for p in DETAILED
    }
    return {
        "name": folder.resolve().name,
        "environment": read_json_object(folder / "environment.json") or {},
        "is_run": config.is_file(),
        "config": config.read_text("utf-8", "replace") if config.is_file() else "",
        "training": training_summary(entries),
        "networks": networks,
        "network_titles": [NETWORK_TITLES.get(name, name) for name in networks],
        "pictured": [i for i, n in enumerate(networks) if any(n in of for of in examples.values())],
        "pictures": picture_groups(examples, evaluations, networks, cluster_names),
        "clusters": clusters,
        "sheets": read_sheets(folder),
        "charts": [chart(entries, curve) for curve in CURVES] if entries else [],
        "torn": torn,
        "evaluations": evaluations,
        "headline": headline,
        "summary": summary_rows(evaluations, networks),
        "groups": class_groups(evaluations),
        "frame": CHART,
    }


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page about a run or another folder of results; returns where it is.

    Args:
        folder: with config.yaml or evaluation/; of what is missing, nothing is said.
        output: the page; FOLDER/report.html by default.

    Raises:
        InputError: `folder` is neither, or one of its files is damaged.
    """
    target = folder / "report.html" if output is None else output
    write_page("report_template.html", page_context(folder), target)
    return target


@cache
def _environment() -> jinja2.Environment:
    """Compiles each template once."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    return environment


def write_page(template: str, context: dict[str, Any], target: Path) -> None:
    """Renders a template beside this file to `target`.

    A reader never sees half a page: it is written beside its place and then moved there.
    """
    page = _environment().get_template(template).render(context).lstrip()
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        file.write(page.encode("utf-8", "replace"))  # JSON text may hold lone surrogates
