"""Which cluster is which class: the assignment that the truth likes best."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from evaluation.miou import Counts

Criterion = Literal["iou", "count", "image"]
CRITERIA = ("iou", "count", "image")


def match_clusters(
    matrix: Counts,
    criterion: Criterion = "iou",
    many_to_one: bool = False,
    images: Counts | None = None,
) -> NDArray[np.int64]:
    """Hungarian matching, or the best class for each cluster on its own.

    Args:
        matrix: int64 [C, K], pixels of class c in cluster k.
        criterion: of which the sum is made largest: IoU (PASCAL), pixels (COCO-Stuff), or images
            in which class and cluster occur together (ImageNet-S).
        many_to_one: every cluster takes its best class (over-clustering).
        images: int64 [C, K], images with class c and cluster k; only for that criterion.

    Returns:
        int64 [K]: class of each cluster; −1 for clusters beyond the number of classes.
    """
    if criterion == "image":
        assert images is not None
        matrix = images
    gain = matrix.astype(np.float64)
    if criterion == "iou":
        union = gain.sum(1, keepdims=True) + gain.sum(0, keepdims=True) - gain
        gain = np.divide(gain, union, out=np.zeros_like(gain), where=union > 0)
    if many_to_one:
        best: NDArray[np.int64] = gain.argmax(0).astype(np.int64)
        return best
    classes, clusters = linear_sum_assignment(gain, maximize=True)
    match = np.full(matrix.shape[1], -1, np.int64)
    match[clusters] = classes
    return match


def merge_columns(matrix: Counts, match: NDArray[np.int64]) -> Counts:
    """Cluster columns [C, K] merged into class columns: [C, C + 1].

    The last column takes the pixels of clusters without a class: wrong wherever they are.
    """
    classes = len(matrix)
    merged = np.zeros((classes, classes + 1), np.int64)
    for cluster, label in enumerate(match):
        merged[:, label] += matrix[:, cluster]
    return merged
