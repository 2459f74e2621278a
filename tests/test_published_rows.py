"""Rows beside a published figure, against a small form of the published steps of their own.

Written in plain NumPy, with loops over images; on cases made so that other readings of the steps
give other figures.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from evaluation.cluster import ClusterConfig
from evaluation.kmeans import assign_images, cluster_images
from evaluation.matching import match_clusters, merge_columns
from evaluation.miou import score
from evaluation.statistics import ImageStatistics
from trainer.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
Maps = list[NDArray[np.int64]]


def mean_iou(truth: Maps, predicted: Maps, classes: int) -> float:
    """Percent, over all classes, -1 in the truth ignored."""
    shares = []
    for one in range(classes):
        pairs = [
            (t[t >= 0] == one, p[t >= 0] == one) for t, p in zip(truth, predicted, strict=True)
        ]
        both, either = (sum(int(join(*pair).sum()) for pair in pairs) for join in (
            np.logical_and, np.logical_or
        ))  # fmt: skip
        shares.append(both / either)
    return 100 * float(np.mean(shares))


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
    return mean_iou(truth, [class_of[one] for one in maps], clusters + 1)


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
