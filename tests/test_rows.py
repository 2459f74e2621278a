"""Results of other options or other images: rows of their own, told apart in every table."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.compare import compared_rows, read_columns
from evaluation.report import page_context
from evaluation.report_data import read_evaluations
from evaluation.result import Result, title_of
from evaluation.rows import own_row
from evaluation.saved_head import read_head
from tests.evaluation_command import evaluate, read_result, tiny_run
from tests.evaluation_data import scene_shards


def result(protocol: str = "kmeans", network: str = "trained", **options: Any) -> Result:
    confusion = np.array([[3, 1], [2, 4]])
    return Result(
        *(protocol, network, 7, (50.0,), np.array([50.0, 50.0]), confusion, 40.0, 70.0),
        *(("background", "a"), 2, 1.0, {"size": 512, "cluster": {"pca": 32}, **options}),
    )


def written(folder: Path, one: Result, samples: Any) -> str:
    row = own_row(one, samples, folder / "evaluation")
    row.write(folder)
    return row.protocol


def test_a_row_is_named_after_what_differs(tmp_path: Path) -> None:
    samples = scene_shards(tmp_path / "test", 4)
    assert written(tmp_path, result(), samples) == "kmeans"
    assert written(tmp_path, result(network="initial"), samples) == "kmeans"
    assert written(tmp_path, result(size=96, network="initial"), samples) == "kmeans@size=96"
    assert written(tmp_path, result(cluster={"pca": 0}), samples) == "kmeans@pca=0"
    both = result(size=96, cluster={"pca": 0})
    assert written(tmp_path, both, samples) == "kmeans@pca=0,size=96"
    assert written(tmp_path, result("linear", size=96), samples) == "linear"  # the first of those
    # what changes no more than rounding, or is measured
    assert written(tmp_path, result(batch_size=1, images_without_foreground=3), samples) == "kmeans"
    assert written(tmp_path, result("linear", size=96, batch_size=1), samples) == "linear"
    more = result("linear", size=96, batch_size=2)
    assert written(tmp_path, more, samples) == "linear@batch_size=2"
    other = scene_shards(tmp_path / "other", 4, seed=1)
    named = written(tmp_path, result(), other)
    assert named.startswith("kmeans@images=other_")
    assert written(tmp_path, result(), other) == named
    assert title_of("kmeans@pca=0,size=96") == "K-means (pca 0, size 96)"
    names = sorted(path.name for path in (tmp_path / "evaluation").glob("kmeans*.json"))
    assert len(names) == 6
    assert {one.protocol for one in read_evaluations(tmp_path)} > {"kmeans", named}


def test_a_long_name_stays_short_and_a_strange_value_safe(tmp_path: Path) -> None:
    samples = scene_shards(tmp_path / "test", 4)
    first = {f"o{number}": "../x y" for number in range(40)}
    written(tmp_path, result(**first), samples)
    named = written(tmp_path, result(**dict.fromkeys(first, "z/../é")), samples)
    assert len(named) < 130
    assert "/" not in named
    assert (tmp_path / "evaluation" / f"{named}-trained.json").is_file()


def test_rows_of_two_sizes_are_told_apart_in_report_and_comparison(tmp_path: Path) -> None:
    samples = scene_shards(tmp_path / "test", 4)
    for run, size in (("a", 512), ("b", 96)):
        written(tmp_path / run, result(size=size), samples)
        written(tmp_path / run, result("linear", size=512), samples)
    titles = [row["title"] for row in page_context(tmp_path / "b")["summary"]]
    assert titles == ["K-means, size 96", "Linear classifier, size 512"]
    titles = [row["title"] for row in page_context(tmp_path / "a")["summary"]]
    assert titles == ["K-means", "Linear classifier"]
    rows = compared_rows(read_columns([tmp_path / "a", tmp_path / "b"]))
    found = {row.title: [cell is not None for cell in row.cells] for row in rows}
    assert found == {
        "K-means, size 512": [True, False],
        "K-means, size 96": [False, True],
        "Linear classifier, size 512": [True, True],
    }


def test_networks_of_one_row_at_two_sizes_are_two_rows(tmp_path: Path) -> None:
    """As files of earlier versions may be."""
    for network, size in (("trained", 96), ("initial", 64)):
        replace(result(network=network, size=size)).write(tmp_path)
    rows = page_context(tmp_path)["summary"]
    assert [row["title"] for row in rows] == ["K-means, size 64", "K-means, size 96"]
    assert [[cell is not None for cell in row["cells"]] for row in rows] == [
        [False, True],
        [True, False],
    ]


@pytest.mark.slow
def test_another_size_overwrites_neither_figures_nor_the_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "run")
    scene_shards(tmp_path / "test", 6)
    quick = ["--shards", tmp_path / "test", "--foreground", "probability", "--seeds", 1]
    quick += ["--device", "cpu", "--html"]
    for size in (40, 48):
        status, out, error = evaluate(capsys, "kmeans", run, "--size", size, *quick)
        assert status == 0, error
    assert "kmeans@size=48-trained.json" in out
    assert read_result(run, "kmeans-trained")["options"]["size"] == 40
    assert read_result(run, "kmeans@size=48-trained")["options"]["size"] == 48
    assert read_head(run / "evaluation" / "kmeans-trained.safetensors").size == 40
    assert read_head(run / "evaluation" / "kmeans@size=48-trained.safetensors").size == 48
    page = (run / "report.html").read_text()
    assert "K-means, size 40" in page
    assert "K-means (size 48)" in page
