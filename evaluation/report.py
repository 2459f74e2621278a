"""One self-contained HTML page about a finished run: numbers, pictures, curves, tables.

Everything read from the run directory is untrusted text. The page is therefore written by an
autoescaping template, and values that reach an attribute of the drawing are numbers made here.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from data_pipeline.sample import IGNORE
from evaluation.report_figures import (
    CHART,
    MAX_CLASSES,
    PROPOSAL_PALETTE,
    VOID,
    Metrics,
    Segments,
    chart,
    css_colour,
    number,
    overlay,
    png_data_uri,
)

Evaluations = dict[str, dict[str, Any]]  # "kmeans-trained" and so on
Examples = dict[str, dict[str, NDArray[Any]]]  # by network

PROTOCOLS = {"kmeans": "K-means", "linear": "Linear classifier"}
NETWORKS = ("trained", "initial")
MAX_EXAMPLES = 12
MAX_CONFUSION = 30

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
)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where the file is missing."""
    if not path.is_file():
        return None
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
        except ValueError:
            entry = None
        step = number(entry.get("step")) if isinstance(entry, dict) else None
        if step is None:
            torn += 1
        else:
            by_step[step] = entry
    return [by_step[step] for step in sorted(by_step)], torn


def read_evaluation(run: Path, protocol: str, network: str) -> dict[str, Any] | None:
    """RUN/evaluation/PROTOCOL-NETWORK.json, checked; None where it is missing.

    IoU and accuracy are in percent; `confusion` becomes int64 [C, C], truth by prediction, and
    `unmatched` int64 [C], pixels of each true class that were predicted as no class.
    """
    path = run / "evaluation" / f"{protocol}-{network}.json"
    payload = read_json_object(path)
    if payload is None:
        return None
    said = (payload.get("protocol", protocol), payload.get("network", network))
    if said != (protocol, network):
        raise InputError(f"{path}: holds {said[0]}-{said[1]}; evaluate {protocol}-{network} again")
    scalars = ("step", "foreground_iou", "pixel_accuracy", "images", "seconds")
    try:
        miou, per_class = payload["miou"], payload["per_class"]
        confusion = np.array(payload["confusion"], dtype=np.int64)
        if confusion.shape != (len(per_class), len(per_class)):
            raise ValueError(f"confusion is {confusion.shape} for {len(per_class)} classes")
        unmatched = np.array(payload.get("unmatched") or np.zeros(len(per_class)), dtype=np.int64)
        if unmatched.shape != (len(per_class),):
            raise ValueError(f"unmatched is {unmatched.shape} for {len(per_class)} classes")
        return {name: number(payload.get(name)) for name in scalars} | {
            "protocol": protocol,
            "network": network,
            "mean": number(miou["mean"]),
            "std": number(miou.get("std")),
            "values": [number(value) for value in miou.get("values") or []],
            "classes": [str(entry["class"]) for entry in per_class],
            "iou": [number(entry.get("iou")) for entry in per_class],
            "pixels": [number(entry.get("pixels")) or 0.0 for entry in per_class],
            "confusion": confusion,
            "unmatched": unmatched,
            "options": dict(payload.get("options") or {}),
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: {error!r}; run this evaluation again") from error


def read_examples(path: Path) -> dict[str, NDArray[Any]] | None:
    """Arrays of an examples file, at most MAX_EXAMPLES of them; None where it is missing."""
    if not path.is_file():
        return None
    wanted = {"image": 4, "embedding_rgb": 4, "mask": 3, "saliency": 3, "clusters": 3, "label": 3}
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name][:MAX_EXAMPLES] for name in ("key", *wanted)}
        square = arrays["image"].shape[:3]
        for name, axes in wanted.items():
            shape = square + ((3,) if axes == 4 else ())
            kind = {"saliency": "f", "label": "i", "clusters": "i"}.get(name, "u")
            if arrays[name].shape != shape or arrays[name].dtype.kind != kind:
                raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
        if arrays["key"].shape != square[:1]:
            raise ValueError(f"{arrays['key'].size} keys for {square[0]} images")
        for name in ("label", "clusters"):
            if ((arrays[name] < VOID) | (arrays[name] >= MAX_CLASSES - 1)).any():
                raise ValueError(f"{name} has values that are no class")
    except (OSError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: {error}; write the examples again") from error
    return arrays


def example_rows(examples: Examples, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One entry a picture; what each network predicts for it is found by its key."""
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
            rows[key]["predictions"][network] = {
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


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units: 2 h 05 min, 3 min 20 s, 12 s."""
    if seconds is None:
        return "not recorded"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def class_rows(evaluations: Evaluations) -> list[dict[str, Any]]:
    """IoU of every class under every evaluation, best under the first of them on top."""
    if not evaluations:
        return []
    first = next(iter(evaluations.values()))
    scores = [(n, dict(zip(e["classes"], e["iou"], strict=True))) for n, e in evaluations.items()]
    total = sum(first["pixels"]) or 1.0
    iou = first["iou"]
    order = sorted(range(len(iou)), key=lambda i: (iou[i] is None, -(iou[i] or 0.0)))
    return [
        {
            "name": first["classes"][i],
            "colour": css_colour(i),
            "share": 100 * first["pixels"][i] / total,
            "iou": {name: by_class.get(first["classes"][i]) for name, by_class in scores},
        }
        for i in order
    ]


def confusion_grid(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Row shares (percent) of the confusion matrix, of the MAX_CONFUSION largest classes."""
    counts = evaluation["confusion"]
    # pixels in clusters without a class are in no column, but part of their row
    totals = counts.sum(axis=1) + evaluation.get("unmatched", 0)
    kept = np.sort(np.argsort(-totals, kind="stable")[:MAX_CONFUSION])
    shares = (100 * counts / np.maximum(totals, 1)[:, None])[np.ix_(kept, kept)]
    names = [evaluation["classes"][i] for i in kept]
    cells = [(row, column, shares[row, column]) for row, column in np.argwhere(shares >= 0.05)]
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])
    return {
        "evaluation": evaluation,
        "names": names,
        "cells": cells,
        "mistakes": [(names[row], names[column], share) for row, column, share in wrong[:5]],
        "hidden": len(evaluation["classes"]) - len(names),
    }


def training_summary(entries: Metrics) -> dict[str, float | None]:
    """Latest and median values of the metrics, None where never logged."""
    summary: dict[str, float | None] = {}
    for key in ("step", "epoch", "loss", "seconds", "images_per_second", "data_wait", "memory_mb"):
        values = [v for v in (number(entry.get(key)) for entry in entries) if v is not None]
        summary[f"last_{key}"] = values[-1] if values else None
        summary[f"median_{key}"] = float(np.median(values)) if values else None
    return summary


def page_context(run: Path) -> dict[str, Any]:
    """All the template shows, from the files of `run`."""
    config = run / "config.yaml"
    if not config.is_file():
        raise InputError(f"{run}: no config.yaml, so not a run; give the directory of a run")
    entries, torn = read_metrics(run / "metrics.jsonl")
    found = {f"{p}-{n}": read_evaluation(run, p, n) for n in NETWORKS for p in PROTOCOLS}
    evaluations = {name: value for name, value in found.items() if value is not None}
    loaded = {n: read_examples(run / "evaluation" / f"examples-{n}.npz") for n in NETWORKS}
    examples = {network: arrays for network, arrays in loaded.items() if arrays is not None}
    classes = next(iter(evaluations.values()))["classes"] if evaluations else []
    shown = [found[f"{p}-trained"] or found[f"{p}-initial"] for p in PROTOCOLS]
    return {
        "name": run.resolve().name,
        "environment": read_json_object(run / "environment.json") or {},
        "config": config.read_text(encoding="utf-8", errors="replace"),
        "training": training_summary(entries),
        "networks": list(examples),
        "examples": example_rows(examples, classes),
        "legend": legend(examples, classes),
        "charts": [chart(entries, curve) for curve in CURVES] if entries else [],
        "torn": torn,
        "evaluations": evaluations,
        "protocols": PROTOCOLS,
        "classes": class_rows(evaluations),
        "confusions": [confusion_grid(evaluation) for evaluation in shown if evaluation],
        "frame": CHART,
    }


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the page about the run directory `run` (RUN/report.html unless `output` is given).

    A reader never sees half a page: it is written beside its place and then moved there.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    source = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    page = environment.from_string(source).render(page_context(run)).lstrip()
    target = run / "report.html" if output is None else output
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        # JSON text may hold lone surrogates, which have no UTF-8.
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target
