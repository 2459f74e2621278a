"""How each image fares under one clustering: from its counts, without another pass."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.cluster import Clusters
from evaluation.miou import Counts
from evaluation.statistics import ImageStatistics

Floats = NDArray[np.float64]
_ROWS = 1 << 16  # vectors that are moved to the space of the centres at a time


@dataclass(frozen=True)
class ImageScores:
    """Of n images and K clusters.

    Attributes:
        sample_ids: int64 [n].
        cluster: int64 [n], 1…K, 0 where nothing was predicted.
        miou: [n], percent, of the image alone, over the classes that its truth has; NaN where all
            of it is ignored.
        object_class: int64 [n], the most frequent class of its truth, background apart; 0 for none.
        distance: [n], to its cluster's centre, squared; infinite where nothing was predicted.
        cluster_iou: [K + 1], percent, of a cluster (0 is everything outside) with the class it was
            matched to; NaN where it has none.
    """

    sample_ids: NDArray[np.int64]
    cluster: NDArray[np.int64]
    miou: Floats
    object_class: NDArray[np.int64]
    distance: Floats
    cluster_iou: Floats


def score_images(
    statistics: ImageStatistics,
    assignment: NDArray[np.int64],
    clusters: Clusters,
    match: NDArray[np.int64],
    matrix: Counts,
) -> ImageScores:
    """Scores of every image and every cluster.

    Args:
        statistics: of the images.
        assignment: int64 [n], each image's cluster 1…K, 0 where nothing was predicted.
        clusters: the centres.
        match: int64 [K + 1], class of each cluster, -1 for none.
        matrix: int64 [C, K + 1], pixels of each true class in each cluster.
    """
    objects = statistics.inside + statistics.outside
    objects[:, 0] = 0
    return ImageScores(
        statistics.sample_ids,
        assignment,
        image_miou(statistics, match[assignment], int(match[0])),
        objects.argmax(1),
        centre_distances(statistics, assignment, clusters),
        _cluster_iou(matrix, match),
    )


def image_miou(
    statistics: ImageStatistics, classes: NDArray[np.int64], background: int = 0
) -> Floats:
    """mIoU of each image alone, percent [n]: its foreground is of `classes` [n], -1 for none."""
    truth = statistics.inside + statistics.outside
    every = np.arange(truth.shape[1])
    inside, outside = classes[:, None] == every, every[None] == background
    right = statistics.inside * inside + statistics.outside * outside
    predicted = statistics.inside.sum(1, keepdims=True) * inside
    predicted = predicted + statistics.outside.sum(1, keepdims=True) * outside
    present = truth > 0
    iou = np.where(present, right / np.maximum(truth + predicted - right, 1), 0)
    count = present.sum(1)
    mean: Floats = np.where(count > 0, 100 * iou.sum(1) / np.maximum(count, 1), np.nan)
    return mean


def centre_distances(
    statistics: ImageStatistics, assignment: NDArray[np.int64], clusters: Clusters
) -> Floats:
    """Squared distance of each image to its cluster's centre [n]; infinite without a cluster."""
    distances = np.full(len(assignment), np.inf)
    found = np.flatnonzero(assignment)
    for first in range(0, len(found), _ROWS):
        rows = found[first : first + _ROWS]
        vectors = statistics.vectors[rows].astype(np.float64)
        points = (vectors - clusters.mean) @ clusters.directions
        distances[rows] = ((points - clusters.centres[assignment[rows] - 1]) ** 2).sum(1)
    return distances


def _cluster_iou(matrix: Counts, match: NDArray[np.int64]) -> Floats:
    columns = np.arange(len(match))
    right = matrix[match, columns]
    union = matrix.sum(1)[match] + matrix.sum(0) - right
    shares: Floats = np.where(
        (match >= 0) & (union > 0), 100 * right / np.maximum(union, 1), np.nan
    )
    return shares
