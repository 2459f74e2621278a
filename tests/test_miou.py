"""Confusion matrices and mIoU: worked by hand, and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from data_pipeline.errors import InputError
from evaluation.miou import confusion, foreground_iou, require_mean, score


def test_a_mean_over_all_classes_counts_absent_ones_as_0() -> None:
    """PASCAL's, as published; one that is only predicted is 0 there too, and elsewhere left out."""
    matrix = np.array([[6, 0, 2, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = score(matrix, "all")
    assert found.miou == pytest.approx((75 + 100 + 0 + 0) / 4)
    assert score(matrix).miou == pytest.approx((75 + 100) / 2)
    assert np.isnan(found.iou).tolist() == [False, False, True, True]
    assert np.isnan(score(np.zeros((3, 3), np.int64), "all").miou)
    with pytest.raises(InputError, match="--mean is 'some'; it can be present or all"):
        require_mean("some")


def test_confusion_counts_truth_in_rows_and_leaves_ignored_out() -> None:
    truth = np.array([[0, 0, 1], [2, -1, -1]], np.int16)
    prediction = np.array([[0, 3, 1], [0, 0, 2]])
    expected = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]
    assert confusion(truth, prediction, 3, 4).tolist() == expected
    assert confusion(truth, prediction, 3, 4).dtype == np.int64
    # classes beyond those that occur still have their row
    assert confusion(truth, prediction.astype(np.uint8), 5, 4).shape == (5, 4)
    ignored = np.full((2, 2), -1, np.int16)
    assert confusion(ignored, np.zeros((2, 2), np.uint8), 2, 2).sum() == 0


def test_scores_of_a_matrix_worked_by_hand() -> None:
    matrix = np.array([[6, 2, 0], [1, 3, 0], [0, 2, 2]])
    result = score(matrix)
    # right / (row + column − right): 6/(8+7−6), 3/(4+7−3), 2/(4+2−2)
    assert result.iou.tolist() == pytest.approx([100 * 6 / 9, 100 * 3 / 8, 100 * 2 / 4])
    assert result.miou == pytest.approx(100 * (6 / 9 + 3 / 8 + 2 / 4) / 3)
    assert result.pixel_accuracy == pytest.approx(100 * 11 / 16)
    # 3 + 2 + 2 of the object pixels are called an object; 16 − 6 are or are called one
    assert foreground_iou(matrix) == pytest.approx(100 * 7 / 10)


def test_perfect_and_all_wrong() -> None:
    perfect = score(np.diag([5, 1, 9]))
    assert perfect.miou == 100
    assert perfect.iou.tolist() == [100, 100, 100]
    assert perfect.pixel_accuracy == 100
    wrong = score(np.array([[0, 4], [1, 0]]))
    assert wrong.miou == 0
    assert wrong.pixel_accuracy == 0


def test_absent_classes_are_not_in_the_mean_but_false_ones_cost_the_others() -> None:
    # class 2 is nowhere in the truth; two pixels of class 0 are called so
    result = score(np.array([[6, 0, 2], [0, 4, 0], [0, 0, 0]]))
    assert result.iou[:2].tolist() == pytest.approx([75, 100])
    assert np.isnan(result.iou[2])
    assert result.miou == pytest.approx(87.5)


def test_the_last_column_is_no_class_and_always_wrong() -> None:
    result = score(np.array([[5, 0, 3], [0, 4, 4]]))
    assert result.iou.tolist() == pytest.approx([100 * 5 / 8, 50])
    assert result.pixel_accuracy == pytest.approx(100 * 9 / 16)
    # no class is no background either
    assert foreground_iou(np.array([[5, 0, 3], [0, 4, 4]])) == pytest.approx(100 * 8 / 11)


def test_one_pixel_decides_a_class() -> None:
    truth, prediction = np.zeros((10, 10), np.int16), np.zeros((10, 10), np.uint8)
    truth[3, 4] = 1
    missed = score(confusion(truth, prediction, 2, 2))
    assert missed.iou.tolist() == pytest.approx([99, 0])
    assert missed.miou == pytest.approx(49.5)
    prediction[3, 4] = 1
    assert score(confusion(truth, prediction, 2, 2)).miou == 100


def test_nothing_to_score_is_not_a_number() -> None:
    nothing = score(np.zeros((3, 3), np.int64))
    assert np.isnan([nothing.miou, nothing.pixel_accuracy]).all()
    assert np.isnan(foreground_iou(np.array([[7, 0], [0, 0]])))


@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn_on_random_maps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 4, -1], (13, 17)).astype(np.int16)  # class 3 is absent
    prediction = rng.integers(0, 5, (13, 17))
    result = score(confusion(truth, prediction, 5, 5))
    kept = truth >= 0
    labels = [0, 1, 2, 4]
    each = jaccard_score(truth[kept], prediction[kept], labels=labels, average=None)
    assert result.iou[labels].tolist() == pytest.approx((100 * each).tolist())
    assert result.miou == pytest.approx(100 * each.mean())
    binary = jaccard_score(truth[kept] > 0, prediction[kept] > 0)
    assert foreground_iou(confusion(truth, prediction, 5, 5)) == pytest.approx(100 * binary)
