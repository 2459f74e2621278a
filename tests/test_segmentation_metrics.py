"""The second pass over a clustering: its maps are those that were scored, its measures by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.labelled import ShardSet, labelled_shards
from data_pipeline.manifest import read_manifest
from data_pipeline.whole_images import WholeImages
from evaluation.cluster import ClusterConfig
from evaluation.imagenet_s_metrics import ImageNetSMetrics
from evaluation.kmeans import evaluate_kmeans
from evaluation.kmeans_config import KMeansConfig
from evaluation.miou import confusion, score
from evaluation.prototypes import PrototypeConfig
from evaluation.segmentation_metrics import segmentation_metrics, segmented
from tests.evaluation_data import block_shards, constant, oracle, random_encoder, scene_shards
from tests.ranks import run_on_ranks
from trainer.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
CLUSTERS = ClusterConfig(pca=0, seeds=(1234, 1235))
QUICK = KMeansConfig(48, PrototypeConfig("probability"), CLUSTERS, batch_size=3)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return scene_shards(tmp_path_factory.mktemp("segmentation"), 10)


@pytest.mark.parametrize(
    "options",
    [
        {"prototype": PrototypeConfig("probability", 0.5)},
        {"prototype": PrototypeConfig("mask")},
        {"unit": "pixel"},
        {"resolution": "image"},
        {"unit": "pixel", "resize": "crop"},
        {"cluster": replace(CLUSTERS, clusters=14)},  # some have no class
        {"cluster": replace(CLUSTERS, clusters=5), "many_to_one": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_maps_are_those_that_were_scored(scenes: ShardSet, options: dict[str, Any]) -> None:
    config = replace(QUICK, **options)
    encoder, classes = random_encoder(), len(scenes.classes)
    result, clustering = evaluate_kmeans(encoder, scenes, config, ALONE, threads=1)
    matrix = np.zeros_like(result.confusion)
    measures = ImageNetSMetrics(classes)
    for label, prediction in segmented(
        encoder, WholeImages(scenes, config.size, 1, config.resize), config, clustering, ALONE
    ):
        assert prediction.shape == label.shape
        column = np.where(prediction < 0, classes, prediction)
        matrix += confusion(label, column, classes, classes + 1)
        measures.add(label, prediction)
    np.testing.assert_array_equal(matrix, result.confusion)
    assert score(matrix).miou == result.values[0]
    plain = measures.scores()
    found = segmentation_metrics(encoder, scenes, config, clustering, ALONE)
    assert plain["miou"] == pytest.approx(result.values[0])
    assert found["image accuracy"] == plain["image_accuracy"]
    assert found["F-beta"] == pytest.approx(plain["f_beta"])
    assert found["boundary mIoU"] == plain["boundary_miou"]
    assert found["mIoU, medium small"] == plain["miou_medium_small"]
    assert found["boundary mIoU, medium large"] == plain["boundary_miou_medium_large"]
    assert len(found) == 11


def test_of_a_network_that_knows_all(tmp_path: Path) -> None:
    blocks = block_shards(tmp_path, [1, 2, 3, 1, 2, 3, 3, 2])
    config = replace(QUICK, prototype=PrototypeConfig("logit"), cluster=CLUSTERS)
    encoder = oracle([blocks], 48)
    _, clustering = evaluate_kmeans(encoder, blocks, config, ALONE, threads=1)
    found = segmentation_metrics(encoder, blocks, config, clustering, ALONE)
    # every object has 320 to 380 of 2,256 pixels: 5 to 25%
    there = {"mIoU, medium small", "boundary mIoU, medium small"}
    sizes = {name for name in found if "," in name}
    assert {name for name in sizes if not math.isnan(found[name])} == there
    # the predicted border of an image is not the label's, which is ignored there
    assert {found[name] for name in ("image accuracy", "F-beta", "mIoU, medium small")} == {100}


def test_of_a_network_that_sees_nothing(tmp_path: Path) -> None:
    blocks = block_shards(tmp_path, [1, 2, 3, 1])
    encoder = constant(-9.0)
    _, clustering = evaluate_kmeans(encoder, blocks, QUICK, ALONE, threads=1)
    found = segmentation_metrics(encoder, blocks, QUICK, clustering, ALONE)
    assert (found["image accuracy"], found["F-beta"]) == (0, 0)


def _on_ranks(ranks: Ranks, folder: Path, unit: Any) -> dict[str, float]:
    samples, encoder = labelled_shards(read_manifest(folder)), random_encoder()
    config = replace(QUICK, unit=unit, batch_size=1)
    _, clustering = evaluate_kmeans(encoder, samples, config, ranks, threads=1)
    return segmentation_metrics(encoder, samples, config, clustering, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["image", "pixel"])
def test_ranks_add_up(scenes: ShardSet, unit: str) -> None:
    folder = scenes.manifest.root
    [alone] = run_on_ranks(_on_ranks, 1, folder, unit)
    for found in run_on_ranks(_on_ranks, 3, folder, unit):
        assert found == pytest.approx(alone, nan_ok=True)
