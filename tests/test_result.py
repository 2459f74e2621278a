"""Results as JSON, Markdown and text."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_pipeline.sources.voc import VOC_CLASSES
from evaluation.published import PUBLISHED
from evaluation.result import Result, mean_and_spread, title_of

MATRIX = np.array([[6, 2, 0, 1], [1, 3, 0, 0], [0, 0, 0, 0]], np.int64)


def result(protocol: str = "kmeans", data_set: str = "") -> Result:
    return Result(
        protocol=protocol,
        network="trained",
        step=12,
        values=(40.0, 44.0),
        iou=np.array([60.0, 50.0, np.nan]),
        confusion=MATRIX,
        foreground_iou=55.5,
        pixel_accuracy=66.6,
        classes=("background", "ant|bee", "cow"),
        images=7,
        seconds=1.23,
        options={"size": 40},
        data_set=data_set,
        metrics={"pixel accuracy": (66.6, 60.0), "boundary mIoU": (12.3, float("nan"))},
    )


def test_json_and_markdown_hold_every_figure(tmp_path: Path) -> None:
    path = result(data_set="coco-stuff-81").write(tmp_path)
    assert path == tmp_path / "evaluation" / "coco-stuff-81" / "kmeans-trained.json"
    found = json.loads(path.read_text())
    assert found["miou"]["mean"] == 42
    assert found["miou"]["std"] == pytest.approx(8**0.5)
    assert found["metrics"]["boundary mIoU"] == [12.3, None]
    assert found["per_class"][2] == {"class": "cow", "iou": None, "pixels": 0}
    assert found["confusion"] == MATRIX[:, :3].tolist()
    assert found["unmatched"] == [1, 0, 0]
    assert [one["value"] for one in found["published"]] == [3.7, 8.8]
    text = path.with_suffix(".md").read_text()
    assert "mIoU **42.0** ± 2.8 over 2 seeds, 7 images" in text
    assert "| mIoU | 42.0 ± 2.8 | 3.7 (MaskContrast) |" in text
    assert "| pixel accuracy | 63.3 ± 4.7 | 8.8 (MaskContrast) |" in text
    assert "| boundary mIoU | 12.3 | – |" in text
    assert "| ant/bee | 50.0 | 4 |" in text, "no column more than the others"
    assert "| cow | absent | 0 |" in text


def test_published_figures_stand_beside_ours_on_the_terminal() -> None:
    output = io.StringIO()
    pascal = replace(result("linear", "voc"), classes=VOC_CLASSES[:3])
    pascal.show(Console(file=output, width=120))
    text = output.getvalue()
    assert "linear classifier of the trained network at step 12, 7 images: mIoU 42.0 ± 2.8" in text
    assert "published: mIoU 63.9, MaskContrast, supervised saliency, ImageNet start" in text
    assert "absent" in text


def test_the_headline_figures_are_those_of_the_paper() -> None:
    values = {key: [one.value for one in figures] for key, figures in PUBLISHED.items()}
    assert values["voc", "kmeans"] == [44.2, 38.9, 35.0]
    assert values["voc", "linear"] == [63.9, 58.4]
    assert values["voc", "linear-crf"] == [65.5, 59.5]
    assert values["voc", "retrieval-7"] == [62.3, 53.4, 48.0]
    assert values["voc", "retrieval-21"] == [49.6, 43.3, 39.0]
    assert values["imagenet-s-50", "kmeans"] == [24.6, 24.2]
    assert result(data_set="scenes").published == ()
    assert result(data_set="voc").published == (), "other classes in PASCAL's layout"


def test_a_figure_that_is_no_number_is_null(tmp_path: Path) -> None:
    path = replace(result(), values=(float("nan"), 4.0)).write(tmp_path)
    assert "NaN" not in path.read_text()
    found = json.loads(path.read_text())["miou"]
    assert found == {"mean": None, "std": None, "values": [None, 4.0]}


def test_protocols_have_names_for_people() -> None:
    assert title_of("kmeans-many-50").endswith("each cluster its class of largest IoU, K = 50")
    assert title_of("kmeans-majority-500").endswith("each cluster its most frequent class, K = 500")
    assert title_of("kmeans-50") == "K-means, one to one, K = 50"
    assert title_of("retrieval-11") == "retrieval, all classes"
    assert title_of("finetune-12.5") == "fine-tuning on 12.5% of the labels"
    assert title_of("something else") == "something else"


def test_spread_of_one_and_of_no_figure() -> None:
    assert mean_and_spread((3.14,)) == "3.1"
    assert mean_and_spread((1.0, 3.0)) == "2.0 ± 1.4"
    assert mean_and_spread((float("nan"),)) == "–"
