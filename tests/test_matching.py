"""Clusters to classes: by hand, and against a search over all assignments."""

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.matching import Criterion, match_clusters, merge_columns
from evaluation.miou import score
from evaluation.statistics import ImageStatistics

Matrix = NDArray[np.int64]


def gains(matrix: Matrix, criterion: str) -> NDArray[np.float64]:
    """IoU or pixels of each class (row) with each cluster (column), by loops."""
    result = np.zeros(matrix.shape)
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            both = matrix[row, column]
            union = matrix[row, :].sum() + matrix[:, column].sum() - both
            result[row, column] = both if criterion == "count" else (both / union if union else 0)
    return result


def best_gain(matrix: Matrix, criterion: str) -> float:
    """The largest sum of gains over all one-to-one assignments."""
    gain = gains(matrix, criterion)
    if gain.shape[0] > gain.shape[1]:
        gain = gain.T
    rows, columns = gain.shape
    return float(
        max(sum(gain[r, c] for r, c in enumerate(p)) for p in permutations(range(columns), rows))
    )


def test_permuted_clusters_are_perfect() -> None:
    permutation = [2, 0, 3, 1]  # the class of each cluster
    matrix = np.zeros((4, 4), np.int64)
    for cluster, label in enumerate(permutation):
        matrix[label, cluster] = 10 + cluster
    match = match_clusters(matrix)
    assert match.tolist() == permutation
    assert match.dtype == np.int64
    merged = merge_columns(matrix, match)
    assert merged.tolist() == [
        [11, 0, 0, 0, 0],
        [0, 13, 0, 0, 0],
        [0, 0, 10, 0, 0],
        [0, 0, 0, 12, 0],
    ]
    assert score(merged).miou == 100


def test_iou_and_count_differ() -> None:
    # IoU: 50/151 + 50/151 straight, 100/200 + 1/101 crossed; pixels: 50 + 50 and 100 + 1
    matrix = np.array([[50, 100], [1, 50]])
    assert match_clusters(matrix, "iou").tolist() == [0, 1]
    assert match_clusters(matrix, "count").tolist() == [1, 0]
    assert match_clusters(matrix).tolist() == [0, 1], "IoU is the default"


def test_fewer_clusters_than_classes_leave_classes_at_zero() -> None:
    matrix = np.array([[50, 1], [2, 3], [0, 30]])
    match = match_clusters(matrix)
    assert match.tolist() == [0, 2]
    merged = merge_columns(matrix, match)
    assert merged.tolist() == [[50, 0, 1, 0], [2, 0, 3, 0], [0, 0, 30, 0]]
    result = score(merged)
    assert result.iou.tolist() == pytest.approx([100 * 50 / 53, 0, 100 * 30 / 34])


def test_more_clusters_than_classes_miss_their_pixels() -> None:
    matrix = np.array([[50, 0, 20, 0], [0, 30, 10, 0]])
    match = match_clusters(matrix)
    assert match.tolist() == [0, 1, -1, -1]
    merged = merge_columns(matrix, match)
    assert merged.tolist() == [[50, 0, 20], [0, 30, 10]]
    assert score(merged).iou.tolist() == pytest.approx([100 * 50 / 70, 100 * 30 / 40])
    many = match_clusters(matrix, many_to_one=True)
    assert many.tolist()[:3] == [0, 1, 0]
    # 20 right and 10 wrong pixels come to class 0
    assert merge_columns(matrix, many).tolist() == [[70, 0, 0], [10, 30, 0]]


def test_many_to_one_takes_the_best_class_by_its_criterion() -> None:
    # most pixels of cluster 0 are of the large class, but it is all that the small class has
    matrix = np.array([[20, 980], [15, 0]])
    assert match_clusters(matrix, "count", many_to_one=True).tolist() == [0, 0]
    assert match_clusters(matrix, "iou", many_to_one=True).tolist() == [1, 0]


def test_clusters_and_classes_without_pixels_do_no_harm() -> None:
    matrix = np.array([[5, 0, 0], [0, 0, 7], [0, 0, 0]])
    match = match_clusters(matrix)
    assert match[[0, 2]].tolist() == [0, 1]
    result = score(merge_columns(matrix, match))
    assert result.miou == 100
    assert np.isnan(result.iou[2])


@pytest.mark.parametrize("criterion", ["iou", "count"])
@pytest.mark.parametrize("shape", [(3, 3), (4, 4), (2, 4), (5, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_no_assignment_is_better(criterion: Criterion, shape: tuple[int, int], seed: int) -> None:
    matrix = np.random.default_rng(seed).integers(0, 30, shape)
    matrix[0, 0] = 0
    match = match_clusters(matrix, criterion)
    gain = gains(matrix, criterion)
    matched = [(label, cluster) for cluster, label in enumerate(match) if label >= 0]
    assert len(matched) == min(shape)
    assert len({label for label, _ in matched}) == len(matched)
    assert sum(gain[pair] for pair in matched) == pytest.approx(best_gain(matrix, criterion))
    merged = merge_columns(matrix, match)
    assert merged.shape == (shape[0], shape[0] + 1)
    assert merged.sum(1).tolist() == matrix.sum(1).tolist()


def test_images_are_matched_by_how_often_class_and_cluster_meet() -> None:
    # pixels speak for 0 → 0, 1 → 1; cluster 0 is in more images of class 1
    pixels = np.array([[100, 5], [3, 50]])
    images = np.array([[1, 3], [4, 1]])
    assert match_clusters(pixels, "image", images=images).tolist() == [1, 0]
    many = match_clusters(pixels, "image", many_to_one=True, images=np.array([[5, 2], [4, 1]]))
    assert many.tolist() == [0, 0]


def test_statistics_count_images_in_which_class_and_cluster_meet() -> None:
    inside = np.array([[0, 9, 0], [0, 2, 5], [0, 0, 0]])
    outside = np.array([[7, 0, 0], [3, 0, 0], [4, 0, 1]])
    vectors = np.ones((3, 2), np.float32)
    statistics = ImageStatistics(vectors, inside, outside, np.arange(3))
    assignment = np.array([2, 1, 0])
    # columns: background of all images; cluster 1: image 1; cluster 2: image 0
    assert statistics.images_together(assignment, 3).tolist() == [[3, 1, 1], [2, 1, 1], [2, 1, 0]]
    assert statistics.confusion(assignment, 3).tolist() == [[14, 0, 0], [0, 2, 9], [1, 5, 0]]
    assert statistics.binary().tolist() == [[14, 0], [0, 11], [1, 5]]
