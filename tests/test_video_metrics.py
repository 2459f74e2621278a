"""J, F and their statistics: worked by hand, and against plain dilation of plain boundaries."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from data_pipeline.errors import InputError
from evaluation.video_metrics import (
    Mask,
    boundary_f_measure,
    by_sequence,
    davis_scores,
    frame_measures,
    mask_boundary,
    region_similarity,
    sequence_scores,
    sequence_statistics,
)

EMPTY = np.zeros((6, 8), bool)


def square(shape: tuple[int, int], top: int, left: int, side: int) -> Mask:
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def plain_boundary(mask: Mask) -> Mask:
    """Martin's seg2bmap, pixel by pixel."""
    height, width = mask.shape
    found = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            east, south = (y, x + 1), (y + 1, x)
            places = [east, south, (y + 1, x + 1)]
            neighbours = [mask[v, u] for v, u in places if v < height and u < width]
            found[y, x] = any(mask[y, x] != other for other in neighbours)
    return found


def plain_f(truth: Mask, prediction: Mask, radius: int) -> float:
    offsets = np.arange(-radius, radius + 1)
    disk = offsets[:, None] ** 2 + offsets**2 <= radius**2
    true, predicted = plain_boundary(truth), plain_boundary(prediction)
    precision = (predicted & binary_dilation(true, disk)).sum() / predicted.sum()
    recall = (true & binary_dilation(predicted, disk)).sum() / true.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blobs(rng: np.random.Generator, shape: tuple[int, int]) -> Mask:
    """Squares at random places, among them ones that the image's border cuts."""
    mask = np.zeros(shape, bool)
    for _ in range(4):
        mask |= square(
            shape, *(int(rng.integers(0, 40)) for _ in range(2)), int(rng.integers(3, 20))
        )
    return mask


def test_j_worked_by_hand() -> None:
    truth, prediction = square((6, 8), 1, 1, 4), square((6, 8), 1, 3, 4)
    assert region_similarity(truth, prediction) == pytest.approx(8 / 24)
    assert region_similarity(truth, truth) == 1
    assert region_similarity(EMPTY, EMPTY) == 1
    assert region_similarity(truth, EMPTY) == 0
    assert region_similarity(EMPTY, prediction) == 0
    void = np.zeros((6, 8), bool)
    void[:, 5:] = True  # 8 pixels that only the prediction has
    assert region_similarity(truth, prediction, void) == pytest.approx(8 / 16)
    assert region_similarity(truth, prediction, ~EMPTY) == 1  # nothing is left


def test_boundary_lies_towards_the_origin_and_never_along_the_image_border() -> None:
    found = mask_boundary(square((5, 6), 2, 2, 2))
    expected = np.zeros((5, 6), bool)
    expected[1, 1:4] = expected[3, 1:4] = expected[1:4, 1] = expected[1:4, 3] = True
    assert found.tolist() == expected.tolist()
    assert not mask_boundary(np.ones((4, 4), bool)).any()
    one_pixel = np.zeros((4, 4), bool)
    one_pixel[0, 0] = True  # in the corner only its own pixel sees a change
    assert np.argwhere(mask_boundary(one_pixel)).tolist() == [[0, 0]]


@pytest.mark.parametrize("seed", range(4))
def test_boundary_and_f_equal_plain_dilation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (45, 61)
    truth, prediction = blobs(rng, shape), blobs(rng, shape)
    assert mask_boundary(truth).tolist() == plain_boundary(truth).tolist()
    for tolerance in (0.008, 0.04, 1, 3):
        radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.sqrt(45**2 + 61**2))
        expected = plain_f(truth, prediction, int(radius))
        assert boundary_f_measure(truth, prediction, None, tolerance) == pytest.approx(expected)


def test_f_of_empty_masks_shifts_and_one_pixel() -> None:
    shape = (480, 854)  # the tolerance is ceil(7.84) = 8 pixels
    truth = square(shape, 100, 100, 50)
    assert boundary_f_measure(truth, truth) == 1
    assert boundary_f_measure(truth, square(shape, 108, 100, 50)) == 1
    assert boundary_f_measure(truth, square(shape, 109, 100, 50)) < 1
    assert boundary_f_measure(truth, square(shape, 300, 600, 50)) == 0
    none = np.zeros(shape, bool)
    assert boundary_f_measure(none, none) == 1
    assert boundary_f_measure(truth, none) == 0
    assert boundary_f_measure(none, truth) == 0
    # a mask of the whole image has no boundary either
    assert boundary_f_measure(none, ~none) == 1
    one = square(shape, 200, 200, 1)
    assert boundary_f_measure(one, one) == 1
    assert boundary_f_measure(one, square(shape, 200, 205, 1)) == 1
    assert boundary_f_measure(one, square(shape, 200, 220, 1)) == 0


def test_void_pixels_are_background_in_both() -> None:
    truth, prediction = square((40, 40), 5, 5, 10), square((40, 40), 5, 5, 10)
    prediction[25:35, 25:35] = True
    void = np.zeros((40, 40), bool)
    void[20:, 20:] = True
    assert boundary_f_measure(truth, prediction) < 1
    assert boundary_f_measure(truth, prediction, void) == 1
    assert boundary_f_measure(prediction, truth, void) == 1
    label = np.where(void, -1, truth).astype(np.int16)
    assert frame_measures(label, prediction.astype(np.int16)).tolist() == [1, 1]
    assert frame_measures(np.maximum(label, 0), prediction).tolist() == pytest.approx(
        [0.5, boundary_f_measure(truth, prediction)]
    )


def test_all_objects_of_a_frame_are_one() -> None:
    label = np.zeros((10, 10), np.int16)
    label[2:5, 2:5], label[2:5, 5:8] = 1, 2
    assert frame_measures(label, (label > 0).astype(np.int64)).tolist() == [1, 1]
    assert frame_measures(label, np.where(label > 0, 3, -1)).tolist() == [1, 1]
    with pytest.raises(InputError, match=r"\(5, 5\).*\(10, 10\)"):
        frame_measures(label, np.zeros((5, 5), np.int64))


def test_statistics_worked_by_hand() -> None:
    values = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1])
    found = sequence_statistics(values)
    assert found.mean == pytest.approx(0.5)
    assert found.recall == pytest.approx(0.4)  # .5 itself is not above .5
    # linspace(1, 10, 5) rounds to 1, 3, 6, 8, 10
    assert found.decay == pytest.approx(0.8 - 0.2)
    # linspace(1, 3, 5) is 1, 1.5, 2, 2.5, 3; halves are rounded up: 1, 2, 2, 3, 3
    assert sequence_statistics(np.array([1.0, 0.6, 0.1])).decay == pytest.approx(0.8 - 0.1)
    assert sequence_statistics(np.array([0.4])).decay == 0
    # longer than 8 bits can count: 1, 100.75, …, 300.25, 400
    long = np.arange(400.0)
    assert sequence_statistics(long).decay == pytest.approx(np.mean([0, 100]) - np.mean([299, 399]))


def measures(j: list[float], f: list[float]) -> NDArray[np.float64]:
    return np.stack([np.array(j), np.array(f)], 1)


def test_scores_over_sequences_and_over_frames() -> None:
    short = measures([1.0, 0.4, 0.0], [1.0, 0.2, 0.0])
    long = measures([1.0, 0.8, 0.6, 0.6, 0.9], [1.0, 0.6, 0.6, 0.3, 0.9])
    inner = davis_scores({"short": short, "long": long})
    assert inner["j_mean"] == pytest.approx(100 * (0.4 + 2 / 3) / 2)
    assert inner["f_mean"] == pytest.approx(100 * (0.2 + 0.5) / 2)
    assert inner["jf_mean"] == pytest.approx((inner["j_mean"] + inner["f_mean"]) / 2)
    assert inner["j_recall"] == pytest.approx(50)
    assert inner["f_recall"] == pytest.approx(100 * (0 + 2 / 3) / 2)
    # of three frames the first quarter is the first two, the last is the third
    assert inner["j_decay"] == pytest.approx(100 * (0 + 0.7 - 0.6) / 2)
    assert inner["j_mean_over_frames"] == pytest.approx(100 * (0.4 + 0.8 + 0.6 + 0.6) / 4)
    assert inner["f_mean_over_frames"] == pytest.approx(100 * (0.2 + 0.6 + 0.6 + 0.3) / 4)
    assert inner["jf_mean_over_frames"] == pytest.approx(100 * (2.4 / 4 + 1.7 / 4) / 2)
    every = davis_scores({"short": short, "long": long}, "all")
    assert every["j_mean"] == pytest.approx(100 * (1.4 / 3 + 3.9 / 5) / 2)
    assert every["j_mean_over_frames"] == pytest.approx(100 * 5.3 / 8)
    assert sequence_scores("long", long)["j_mean"] == pytest.approx(100 * 2 / 3)


def test_frames_are_put_in_order_of_their_names() -> None:
    keys = ["dog/00002", "bear/00000", "dog/00000", "dog/00001"]
    grouped = by_sequence(keys, np.arange(8.0).reshape(4, 2))
    assert list(grouped) == ["bear", "dog"]
    assert grouped["dog"].tolist() == [[4, 5], [6, 7], [0, 1]]
    with pytest.raises(InputError, match="bear00000 names no sequence"):
        by_sequence(["bear00000"], np.zeros((1, 2)))
    with pytest.raises(InputError, match="bear/00000 occurs twice"):
        by_sequence(["bear/00000", "bear/00000"], np.zeros((2, 2)))


def test_what_cannot_be_scored_is_named() -> None:
    two = measures([1, 0.5], [1, 0.5])
    with pytest.raises(InputError, match="sequence bear has 2 frames"):
        davis_scores({"bear": two})
    assert davis_scores({"bear": two}, "all")["j_mean"] == pytest.approx(75)
    with pytest.raises(InputError, match="no sequence"):
        davis_scores({})
    with pytest.raises(InputError, match="bear have no J or F"):
        davis_scores({"bear": measures([1, np.nan, 1], [1, 1, 1])})
