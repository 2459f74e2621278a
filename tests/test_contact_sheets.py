"""Contact sheets: which images are taken, what is written of them, what the page makes of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from evaluation.cluster import ClusterConfig, Clusters
from evaluation.commands.kmeans import run_kmeans
from evaluation.commands.options import Subject
from evaluation.commands.retrieval import run_retrieval
from evaluation.contact_sheets import extremes, nearest_members
from evaluation.gallery import MAX_SIDE, Gallery, read_gallery
from evaluation.image_scores import ImageScores, image_miou, score_images
from evaluation.kmeans_config import KMeansConfig
from evaluation.prototypes import PrototypeConfig
from evaluation.report import write_report
from evaluation.report_sheets import (
    CLUSTER_ARRAYS,
    NEIGHBOUR_ARRAYS,
    cluster_sheet,
    neighbour_sheet,
    read_sheets,
)
from evaluation.retrieval import RetrievalConfig
from evaluation.statistics import ImageStatistics
from tests.evaluation_data import block_shards, oracle
from trainer.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
HOSTILE = '"><script>alert(1)</script>'


def hand_statistics() -> ImageStatistics:
    """Three images of 10 pixels, and one where nothing was predicted."""
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [0, 0]], np.float32)
    inside = np.array([[1, 3, 0], [2, 2, 0], [0, 0, 4], [0, 0, 0]])
    outside = np.array([[6, 0, 0], [4, 2, 0], [6, 0, 0], [8, 2, 0]])
    return ImageStatistics(vectors, inside, outside, np.array([10, 11, 12, 13]))


def scores(miou: list[float], **more: Any) -> ImageScores:
    count = len(miou)
    known = ImageScores(
        np.arange(count), np.ones(count, np.int64), np.array(miou), np.ones(count, np.int64),
        np.zeros(count), np.zeros(2),
    )  # fmt: skip
    return replace(known, **more)


def test_each_image_is_scored_alone() -> None:
    statistics = hand_statistics()
    # right; half of the object; a cluster of the wrong class; nothing predicted
    miou = image_miou(statistics, np.array([1, 1, -1, 0]))
    background, ant = [6 / 7, 4 / 8, 6 / 6, 8 / 10], [3 / 4, 2 / 6, 0 / 4, 0 / 2]
    assert miou.tolist() == pytest.approx(
        [50 * (b + a) for b, a in zip(background, ant, strict=True)]
    )
    ignored = ImageStatistics(
        *(statistics.vectors, 0 * statistics.inside, 0 * statistics.outside, np.arange(4))
    )
    assert np.isnan(image_miou(ignored, np.zeros(4, np.int64))).all()


def test_distances_clusters_and_objects_of_a_hand_case() -> None:
    clusters = Clusters(np.zeros(2), np.eye(2), np.array([[1.0, 0.0], [0.0, 1.0]]))
    statistics, assignment = hand_statistics(), np.array([1, 1, 2, 0])
    matrix = statistics.confusion(assignment, 3)
    found = score_images(statistics, assignment, clusters, np.array([0, 1, -1]), matrix)
    assert found.distance.tolist() == pytest.approx([0, 0.16 + 0.64, 0, np.inf])
    assert found.object_class.tolist() == [1, 1, 2, 1]
    # of 27 background pixels 24 are outside, of 9 ants 5 in cluster 1 with 3 others, and 4 outside
    assert found.cluster_iou[:2].tolist() == pytest.approx([100 * 24 / 31, 100 * 5 / 12])
    assert np.isnan(found.cluster_iou[2])


def test_best_and_worst_have_an_object_and_are_not_the_same() -> None:
    nan = float("nan")
    objects = np.array([1, 1, 0, 1, 1, 1, 1])
    best, worst = extremes(scores([50, 90, 99, nan, 10, 50, 30], object_class=objects), 2)
    assert (best.tolist(), worst.tolist()) == ([1, 0], [4, 6])
    best, worst = extremes(scores([50, 90, 10]), 8)
    assert (best.tolist(), worst.tolist()) == ([1, 0], [2])


def test_members_are_the_nearest_of_their_cluster() -> None:
    near = scores(
        [0] * 5, cluster=np.array([1, 2, 1, 1, 0]), distance=np.array([3, 0, 1, 2, np.inf])
    )
    assert nearest_members(near, 1, 2).tolist() == [2, 3]
    assert nearest_members(near, 2, 3).tolist() == [1, -1, -1]


def small_gallery(**more: Any) -> Gallery:
    """Two images, two clusters; the second image is in the wrong one."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 3, 3, 3), dtype=np.uint8)
    arrays: dict[str, Any] = {
        "miou": np.array([80.0, np.nan]), "object_class": np.array([1, 1]),
        "best": np.array([0]), "worst": np.array([1]), "clusters": np.array([2, 1]),
        "cluster_class": np.array([1, -1]), "cluster_iou": np.array([40.0, np.nan]),
        "cluster_images": np.array([7, 1]), "member": np.array([[0, -1], [1, -1]]),
        "cluster_count": np.array(5),
    }  # fmt: skip
    segments = np.zeros((2, 24, 24), np.int16)
    segments[0, 4:20, 4:20], segments[1, 4:20, 4:20] = 1, -1
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)
    names = ["background", HOSTILE]
    return Gallery(["a", "b"], images, segments, names, "kmeans", HOSTILE, arrays | more)


def test_a_gallery_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = small_gallery()
    written.write(tmp_path / "a.npz")
    read = read_gallery(tmp_path / "a.npz", CLUSTER_ARRAYS)
    assert (read.keys, read.names, read.network) == (["a", "b"], written.names, HOSTILE)
    assert (read.segments == written.segments).all()
    assert np.abs(read.images.astype(int) - written.images).mean() < 16  # JPEG
    sheet = cluster_sheet(read)
    assert [(c["name"], c["iou"], c["images"], c["number"]) for c in sheet["clusters"]] == [
        (HOSTILE, 40.0, 7, 2),
        ("no class", None, 1, 1),
    ]
    assert [[m["right"] for m in c["members"]] for c in sheet["clusters"]] == [[True], [False]]
    assert [(e["miou"], e["predicted"]) for e in sheet["best"] + sheet["worst"]] == [
        (80.0, HOSTILE),
        (None, "no class"),
    ]
    assert sheet["count"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jpeg": np.frombuffer(b"\xff\xd8 torn", np.uint8)}, "cannot identify"),
        ({"segments": np.zeros((2, MAX_SIDE + 1, 9), np.int16)}, "161 × 9 pixels"),
        ({"segments": np.zeros((2, 25, 24), np.int16)}, r"of \(24, 24\) pixels instead"),
        ({"segments": np.full((2, 24, 24), 2000, np.int16)}, "no class"),
        ({"member": np.array([[0, -1], [2, -1]])}, "no picture 2"),
        ({"miou": np.zeros(3)}, "3 entries instead of 2"),
        ({"cluster_iou": np.zeros(1)}, "1 entries instead of 2"),
        ({"key": np.array([object()] * 2)}, "allow_pickle"),
        ({"best": np.zeros(1)}, "best is float64"),
    ],
)
def test_damaged_sheets_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "evaluation" / "clusters-kmeans-trained.npz"
    path.parent.mkdir()
    small_gallery().write(path)
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | change))
    with pytest.raises(InputError, match=message) as error:
        write_report(tmp_path)
    assert "clusters-kmeans-trained.npz" in str(error.value)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / "voc" / "clusters-kmeans-x.npz"
    path.parent.mkdir(parents=True)
    small_gallery().write(path)
    page = write_report(tmp_path).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 4
    assert page.count("data:image/jpeg;base64,") == 4


@pytest.mark.slow
def test_sheets_of_a_network_that_knows_everything(tmp_path: Path) -> None:
    bank = block_shards(tmp_path / "bank", [1, 2, 3, 1, 2, 3])
    samples = block_shards(tmp_path / "val", [1, 2, 3, 0, 1, 2, 2], first=20)
    subject = Subject(oracle([bank, samples], 48), "trained", tmp_path)
    config = KMeansConfig(
        48, PrototypeConfig("probability"), ClusterConfig(pca=0, seeds=(1, 2)), batch_size=3
    )
    run_kmeans(subject, samples, config, "", ALONE, 2).write(tmp_path)
    for result in run_retrieval(
        subject, bank, samples, RetrievalConfig(48, config.prototype), "", ALONE
    ):
        result.write(tmp_path)
    path = tmp_path / "evaluation" / "clusters-kmeans-trained.npz"
    gallery = read_gallery(path, CLUSTER_ARRAYS)
    sheet = cluster_sheet(gallery)
    keys = {c["name"]: [m["key"] for m in c["members"]] for c in sheet["clusters"]}
    assert keys == {
        "ant": ["block_020", "block_024"],
        "bee": ["block_021", "block_025", "block_026"],
        "cow": ["block_022"],
    }
    assert [c["images"] for c in sheet["clusters"]] == [3, 2, 1]
    assert all(c["iou"] == 100 for c in sheet["clusters"])
    assert all(m["right"] for c in sheet["clusters"] for m in c["members"])
    assert "block_023" not in gallery.keys  # nothing is on it
    shown = gallery.segments[list(gallery.keys).index("block_022")]
    assert set(np.unique(shown)) == {0, 3}
    near = neighbour_sheet(read_gallery(path.with_name("neighbours-trained.npz"), NEIGHBOUR_ARRAYS))
    assert [row["key"] for row in near["rows"]] == [f"block_0{n}" for n in (20, 21, 22, 24, 25, 26)]
    first = near["rows"][0]["neighbours"]
    assert [one["right"] for one in first] == [True, True, False, False, False]
    assert [one["name"] for one in first[:2]] == ["ant", "ant"]
    assert {one["key"] for one in first[:2]} == {"block_000", "block_003"}
    assert [one["cosine"] for one in first] == pytest.approx([1, 1, 0, 0, 0])
    page = write_report(tmp_path).read_text()
    assert page.count("✓ ant") == 4  # two queries with two ants each
    titles = read_sheets(tmp_path)["neighbours"][0]
    assert (titles["protocol"], titles["network"]) == ("retrieval, all classes", "trained")
    assert json.loads((path.parent / "retrieval-4-trained.json").read_text())["miou"]["mean"] == 100
