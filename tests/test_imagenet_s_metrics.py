"""The measures of ImageNet-S: worked by hand, and against plain loops over images and classes."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from data_pipeline.errors import InputError
from evaluation.imagenet_s_metrics import (
    ImageNetSMetrics,
    boundary_width,
    class_boundary,
    f_beta,
)
from evaluation.miou import confusion, score

Map = NDArray[np.int16]
Pair = tuple[Map, Map]
CLASSES = 6


def random_map(rng: np.random.Generator, lowest: int) -> Map:
    """Background with rectangles of some classes."""
    values = np.zeros((30, 40), np.int16)
    for _ in range(int(rng.integers(1, 5))):
        top, bottom = sorted(rng.integers(0, 31, 2))
        left, right = sorted(rng.integers(0, 41, 2))
        values[top : bottom + 1, left : right + 1] = rng.integers(lowest, CLASSES)
    return values


def random_pairs(count: int, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [(random_map(rng, -1), random_map(rng, -1)) for _ in range(count)]


def scores_of(pairs: list[Pair], classes: int = CLASSES) -> dict[str, float]:
    metrics = ImageNetSMetrics(classes)
    for label, prediction in pairs:
        metrics.add(label, prediction)
    return metrics.scores()


def plain_boundary(values: Map) -> NDArray[np.bool_]:
    """Each region without what is left of it after so many erosions by a 3×3 square."""
    width = max(1, round(0.03 * math.hypot(*values.shape)))
    found = np.zeros(values.shape, bool)
    for value in np.unique(values):
        region = values == value
        found |= region & ~binary_erosion(region, np.ones((3, 3)), width, border_value=0)
    return found


def plain_mean_iou(pairs: list[Pair], size: int | None, boundary: bool) -> float:
    sums = np.zeros((CLASSES, 3))
    for label, prediction in pairs:
        kept = label >= 0
        percent = [math.ceil(100 * (label == c).sum() / kept.sum()) for c in range(CLASSES)]
        size_of = [sum(p > limit for limit in (5, 25, 50)) for p in percent]
        if size is not None:
            right = [c for c in range(1, CLASSES) if (label == c).any() and size_of[c] == size]
            if not right:
                continue
            kept = kept & np.isin(label, [0, *right])
        edges = (plain_boundary(label), plain_boundary(prediction)) if boundary else (True, True)
        for c in range(CLASSES):
            true, predicted = (label == c) & kept & edges[0], (prediction == c) & kept & edges[1]
            sums[c] += (true & predicted).sum(), (true | predicted).sum(), true.sum()
    present = sums[:, 2] > 0
    return float(100 * (sums[present, 0] / sums[present, 1]).mean())


def test_all_means_equal_plain_loops() -> None:
    pairs = random_pairs(25)
    found = scores_of(pairs)
    sizes = ("small", "medium_small", "medium_large", "large")
    for size, suffix in [(None, ""), *((n, f"_{name}") for n, name in enumerate(sizes))]:
        assert found[f"miou{suffix}"] == pytest.approx(plain_mean_iou(pairs, size, False))
        assert found[f"boundary_miou{suffix}"] == pytest.approx(plain_mean_iou(pairs, size, True))


def test_miou_equals_that_of_the_confusion_matrix() -> None:
    pairs = random_pairs(10, seed=1)
    matrix = sum(confusion(label, p % (CLASSES + 1), CLASSES, CLASSES + 1) for label, p in pairs)
    assert scores_of(pairs)["miou"] == pytest.approx(score(np.asarray(matrix)).miou)


def test_f_beta_and_accuracy_equal_plain_loops() -> None:
    pairs = random_pairs(40, seed=2)
    f_values, right = [], []
    for label, prediction in pairs:
        kept = label >= 0
        true, predicted = label[kept] != 0, prediction[kept] != 0
        both = (true & predicted).sum()
        precision, recall = both / max(1, predicted.sum()), both / max(1, true.sum())
        below = 0.3 * precision + recall
        f_values.append(1.3 * precision * recall / below if below else 0)
        frequency = [(prediction[kept] == c).sum() for c in range(1, CLASSES)]
        named = 1 + frequency.index(max(frequency))
        right.append(max(frequency) > 0 and named in label)
    found = scores_of(pairs)
    assert 0 < sum(right) < len(right)
    assert found["f_beta"] == pytest.approx(100 * np.mean(f_values))
    assert found["image_accuracy"] == pytest.approx(100 * np.mean(right))


def test_worked_by_hand() -> None:
    # 20 × 20 pixels, boundary of round(.85) = 1 pixel; class 1 is 4 × 4, seen 1 column to the left
    label, prediction = np.zeros((2, 20, 20), np.int16)
    label[5:9, 5:9], prediction[5:9, 4:8] = 1, 1
    found = scores_of([(label, prediction)], 2)
    assert found["miou"] == pytest.approx(100 * (380 / 388 + 12 / 20) / 2)
    # a ring of 12 pixels each: only two rows of 3 in common
    object_iou = 6 / 18
    # of background: the border's 76 pixels and a ring of 20 around each square
    around = np.zeros((2, 20, 20), bool)
    around[0, 4:10, 4:10], around[1, 4:10, 3:9] = True, True
    around[0, 5:9, 5:9] = around[1, 5:9, 4:8] = False
    both, either = 76 + (around[0] & around[1]).sum(), 76 + (around[0] | around[1]).sum()
    assert found["boundary_miou"] == pytest.approx(100 * (object_iou + both / either) / 2)
    # 16 of 400 pixels are 4%: small
    assert found["miou_small"] == found["miou"]
    assert np.isnan([found["miou_medium_small"], found["boundary_miou_large"]]).all()
    assert found["f_beta"] == pytest.approx(75)  # precision and recall are 12 of 16
    assert found["image_accuracy"] == 100


def test_limits_of_the_sizes_belong_to_the_smaller() -> None:
    for pixels, name in ((5, "small"), (6, "medium_small"), (25, "medium_small")):
        label = np.zeros((10, 10), np.int16)
        label.flat[:pixels] = 1
        found = scores_of([(label, label)], 2)
        assert [key for key, value in found.items() if value == 100 and key[:5] == "miou_"] == [
            f"miou_{name}"
        ]
    # of the pixels that count: 5 of 90
    label = np.zeros((10, 10), np.int16)
    label.flat[:5], label.flat[90:] = 1, -1
    assert math.isnan(scores_of([(label, label)], 2)["miou_small"])


def test_ignored_pixels_count_nowhere() -> None:
    label, prediction = np.zeros((2, 20, 20), np.int16)
    label[5:9, 5:9] = prediction[5:9, 5:9] = 1
    label[14:] = -1
    prediction[16:] = 2  # farther from what counts than the boundary is wide
    found = scores_of([(label, prediction)], 3)
    assert found["miou"] == 100
    assert found["f_beta"] == 100
    assert found["image_accuracy"] == 100  # although class 2 has more pixels
    # the label's background ends at row 13, the prediction's goes on: 18 pixels of its boundary
    border, around = 20 + 2 * 13, 20
    assert found["boundary_miou"] == pytest.approx(
        100 * (1 + (border + around) / (border + around + 18)) / 2
    )
    ignored = np.full((20, 20), -1, np.int16)
    assert scores_of([(label, prediction), (ignored, prediction)], 3) == pytest.approx(
        found, nan_ok=True
    )


def test_empty_predictions_and_truths() -> None:
    label, nothing = np.zeros((2, 20, 20), np.int16)
    label[5:9, 5:9] = 1
    missed = scores_of([(label, nothing)], 3)
    assert missed["miou"] == pytest.approx(100 * (384 / 400) / 2)  # class 2 is not in the mean
    assert (missed["f_beta"], missed["image_accuracy"]) == (0, 0)
    invented = scores_of([(nothing, label)], 3)
    assert invented["miou"] == pytest.approx(96)
    assert (invented["f_beta"], invented["image_accuracy"]) == (0, 0)
    neither = scores_of([(nothing, nothing)], 3)
    assert (neither["miou"], neither["boundary_miou"], neither["f_beta"]) == (100, 100, 0)
    no_class = scores_of([(label, -label)], 3)  # found, but of no class
    assert (no_class["f_beta"], no_class["image_accuracy"]) == (100, 0)
    assert no_class["miou"] == pytest.approx(100 / 2)
    assert all(math.isnan(value) for value in scores_of([]).values())


def test_an_object_of_one_pixel() -> None:
    label = np.zeros((20, 20), np.int16)
    label[7, 7] = 1
    assert scores_of([(label, label)], 2)["boundary_miou_small"] == 100
    moved = scores_of([(label, np.roll(label, 1))], 2)
    assert moved["miou"] == pytest.approx(100 * (398 / 400) / 2)


def test_boundary_reaches_the_width_of_erosions() -> None:
    assert boundary_width((375, 500), 0.03) == 19
    assert boundary_width((10, 10), 0.03) == 1
    values = np.zeros((9, 9), np.int16)
    values[:, 6:] = 1
    found = class_boundary(values, 2)
    # two pixels from the border of the image and on both sides of the edge; class 1 is all edge
    assert np.argwhere(~found).tolist() == [[y, x] for y in range(2, 7) for x in (2, 3)]


def test_f_beta_worked_by_hand() -> None:
    truth, prediction = np.zeros((2, 10), bool)
    truth[:4], prediction[3:5] = True, True
    # precision 1/2, recall 1/4
    assert f_beta(truth, prediction) == pytest.approx(1.3 * 0.125 / (0.15 + 0.25))
    assert f_beta(truth, truth) == 1


def test_parts_sum_to_the_whole() -> None:
    pairs = random_pairs(12, seed=3)
    parts = [ImageNetSMetrics(CLASSES) for _ in range(3)]
    for number, pair in enumerate(pairs):
        parts[number % 3].add(*pair)
    parts[0].merge(parts[1].arrays())
    for name, array in parts[0].arrays().items():
        array += parts[2].arrays()[name]  # as a sum over ranks writes into them
        assert array.dtype == (np.float64 if name == "f_beta" else np.int64)
    assert parts[0].scores() == pytest.approx(scores_of(pairs), nan_ok=True)


def test_wrong_maps_are_refused() -> None:
    metrics = ImageNetSMetrics(3)
    zeros = np.zeros((4, 4), np.int16)
    with pytest.raises(InputError, match=r"\(4, 5\).*\(4, 4\)"):
        metrics.add(zeros, np.zeros((4, 5), np.int16))
    with pytest.raises(InputError, match=r"prediction has the class 3; .* largest is 2"):
        metrics.add(zeros, zeros + 3)
    with pytest.raises(InputError, match="label has the class 7"):
        metrics.add(zeros + 7, zeros)
    with pytest.raises(InputError, match="-2; −1 means no class"):
        metrics.add(zeros, zeros - 2)
    with pytest.raises(InputError, match="1 classes"):
        ImageNetSMetrics(1)
    assert metrics.arrays()["images"].tolist() == [0]
