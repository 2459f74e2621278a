"""Rows beside a published figure, against a small form of the published steps of their own.

Written in plain NumPy, with loops over images; on cases made so that other readings of the steps
give other figures.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from data_pipeline.build_config import BuildConfig
from data_pipeline.labelled import ShardSet, labelled_shards
from data_pipeline.sources.item import Listing
from data_pipeline.write_shards import build_shards
from evaluation.cluster import ClusterConfig
from evaluation.kmeans import assign_images, cluster_images
from evaluation.matching import match_clusters, merge_columns
from evaluation.miou import score
from evaluation.retrieval import SEVEN, RetrievalConfig, evaluate_retrieval
from evaluation.statistics import ImageStatistics
from tests.evaluation_data import LabelItem, oracle
from trainer.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
Maps = list[NDArray[np.int64]]


def iou_of_each(truth: Maps, predicted: Maps, classes: int) -> list[float]:
    """Percent of each class, -1 in the truth ignored."""
    shares = []
    for one in range(classes):
        pairs = [
            (t[t >= 0] == one, p[t >= 0] == one) for t, p in zip(truth, predicted, strict=True)
        ]
        both, either = (sum(int(join(*pair).sum()) for pair in pairs) for join in (
            np.logical_and, np.logical_or
        ))  # fmt: skip
        shares.append(100 * both / either)
    return shares


def statistics_of(vectors: NDArray[np.float32], truth: Maps, masks: Maps) -> ImageStatistics:
    classes = 1 + max(int(label.max()) for label in truth)
    inside, outside = (
        np.array([np.bincount(t[(m == side) & (t >= 0)], minlength=classes)
                  for t, m in zip(truth, masks, strict=True)])
        for side in (1, 0)
    )  # fmt: skip
    return ImageStatistics(vectors, inside, outside, np.arange(len(vectors)))


def pictures(empty: int, groups: int = 5, each: int = 12) -> tuple[NDArray[np.float32], Maps, Maps]:
    """Unit vectors around as many axes as classes, labels, and masks; `empty` have no mask."""
    rng = np.random.default_rng(3)
    classes = 1 + rng.permutation(np.arange(groups * each) % groups)
    vectors = np.eye(8)[classes - 1] + 0.25 * rng.normal(size=(len(classes), 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    truth, masks = [], []
    for number, label in enumerate(classes):
        place = np.zeros((12, 12), np.int64)
        place[2:9, 3 : 5 + number % 6] = label
        mask = np.roll((place > 0).astype(np.int64), number % 2, 0)
        place[-1] = -1
        if number < empty:
            mask[:], vectors[number] = 0, 0
        truth.append(place)
        masks.append(mask)
    return vectors.astype(np.float32), truth, masks


def published_kmeans(
    vectors: NDArray[np.float32], truth: Maps, masks: Maps, clusters: int, seed: int
) -> float:
    """Every image's vector, zero or not, is clustered; a matched map for each image."""
    points = PCA(min(32, vectors.shape[1]), whiten=True).fit_transform(vectors.astype(np.float64))
    found = MiniBatchKMeans(clusters, batch_size=1000, n_init=3, random_state=seed).fit(points)
    maps = [mask * (1 + cluster) for mask, cluster in zip(masks, found.labels_, strict=True)]
    overlap = np.zeros((clusters + 1, clusters + 1))
    for own, label in np.ndindex(*overlap.shape):
        pairs = [((m == own)[t >= 0], (t == label)[t >= 0])
                 for m, t in zip(maps, truth, strict=True)]  # fmt: skip
        either = sum(int((a | b).sum()) for a, b in pairs)
        overlap[own, label] = sum(int((a & b).sum()) for a, b in pairs) / max(1, either)
    class_of = linear_sum_assignment(-overlap)[1]
    return float(np.mean(iou_of_each(truth, [class_of[one] for one in maps], clusters + 1)))


def our_kmeans(statistics: ImageStatistics, config: ClusterConfig) -> list[float]:
    values = []
    for clusters in cluster_images(statistics, config.clusters, config, ALONE):
        matrix = statistics.confusion(assign_images(statistics, clusters), config.clusters + 1)
        values.append(score(merge_columns(matrix, match_clusters(matrix))).miou)
    return values


@pytest.mark.parametrize("empty", [0, 6])
def test_kmeans_clusters_images_without_foreground_as_zero_vectors(empty: int) -> None:
    vectors, truth, masks = pictures(empty)
    statistics, config = statistics_of(vectors, truth, masks), ClusterConfig(5)
    expected = [published_kmeans(vectors, truth, masks, 5, seed) for seed in config.seeds]
    assert our_kmeans(statistics, config) == pytest.approx(expected, abs=1e-9)
    apart = our_kmeans(statistics, replace(config, without_foreground="leave-out"))
    if empty:
        assert np.mean(apart) > np.mean(expected) + 3, "the zero vectors took a cluster"
    else:
        assert apart == pytest.approx(expected)


def labels_of_two(seed: int, count: int) -> Maps:
    """One object of two classes out of eight, from almost all of the one to most of the other."""
    rng, labels = np.random.default_rng(seed), []
    for number in range(count):
        label = np.zeros((24, 24), np.int64)
        first, second = 1 + rng.permutation(8)[:2]
        label[3:21, 4:20], label[3 : 6 + 2 * (number % 7), 4:20] = first, second
        label[-1] = -1
        labels.append(label)
    return labels


def known_shards(folder: Path, labels: Maps, names: tuple[str, ...], first: int) -> ShardSet:
    items = [LabelItem(first + number, label) for number, label in enumerate(labels)]
    return labelled_shards(
        build_shards(Listing(items, names), folder, BuildConfig(10, shuffle_seed=-1))
    )


def published_retrieval(bank: Maps, queries: Maps, kept: list[int]) -> tuple[float, int]:
    """Percent over the kept classes, and prototypes; an image's vector is its classes' shares.

    Labels of all other classes are 255 before anything is counted.
    """

    def vector(label: NDArray[np.int64]) -> NDArray[np.float64]:
        shares = np.bincount(label[label > 0], minlength=9).astype(np.float64)
        unit: NDArray[np.float64] = shares / np.linalg.norm(shares)
        return unit

    def reduced(label: NDArray[np.int64]) -> NDArray[np.int64]:
        new = np.full_like(label, 255)
        for place, old in enumerate([0, *kept]):
            new[label == old] = place
        return new

    prototypes, names = [], []
    for label in bank:
        values = [value for value in reduced(label)[label > 0].tolist() if value not in (0, 255)]
        if values:
            prototypes.append(vector(label))
            names.append(max(sorted(set(values)), key=values.count))
    truth, predicted = [], []
    for label in queries:
        nearest = int(np.argmax([vector(label) @ other for other in prototypes]))
        truth.append(np.where(reduced(label) == 255, -1, reduced(label)))
        predicted.append((label > 0) * names[nearest])
    shares = iou_of_each(truth, predicted, 1 + len(kept))
    return float(np.mean(shares if len(kept) == 8 else shares[1:])), len(prototypes)


def test_retrieval_of_seven_classes_ignores_the_others_before_a_mask_is_named(
    tmp_path: Path,
) -> None:
    """Class 3 is none of the seven: where it has 60% of a mask, the other 40% name it."""
    bank, queries = labels_of_two(1, 30), labels_of_two(2, 20)
    names = ("background", *SEVEN[:2], "horse", *SEVEN[2:])
    sets = (
        known_shards(tmp_path / "bank", bank, names, 0),
        known_shards(tmp_path / "queries", queries, names, 100),
    )
    every, seven = evaluate_retrieval(oracle([*sets], 24), *sets, RetrievalConfig(24), ALONE)[0]
    expected, used = published_retrieval(bank, queries, list(range(1, 9)))
    assert every.values[0] == pytest.approx(expected)
    assert (every.options["bank_used"], used) == (30, 30)
    expected, used = published_retrieval(bank, queries, [1, 2, 4, 5, 6, 7, 8])
    assert seven.values[0] == pytest.approx(expected)
    assert seven.options["bank_used"] == used == 30, "no mask is of horses alone"
    assert any((label == 3).sum() > 0.6 * (label > 0).sum() for label in bank)
