"""Views: pure functions of seed and position, and crops of valid coverage."""

import dataclasses

import numpy as np
import pytest

from data_pipeline.errors import InputError
from data_pipeline.views import ViewConfig, choose_window, colour_matrix, draw_views

CONFIG = ViewConfig(image_size=64)


def test_views_depend_on_seed_epoch_and_position_only() -> None:
    first = draw_views(1, 2, 3, 50, 70, CONFIG)
    for other in ((1, 2, 4), (1, 3, 3), (2, 2, 3)):
        assert not np.array_equal(draw_views(*other, 50, 70, CONFIG)[0].windows, first[0].windows)
    again = draw_views(1, 2, 3, 50, 70, CONFIG)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.windows, b.windows)
        assert dataclasses.astuple(a)[1:] == dataclasses.astuple(b)[1:]
    assert not np.array_equal(first[0].windows, first[1].windows)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (333, 500), (500, 20), (16, 16)])
def test_windows_lie_inside_the_image(height: int, width: int) -> None:
    for position in range(50):
        for view in draw_views(0, 0, position, height, width, CONFIG):
            top, left, h, w = view.windows.T
            assert (h >= 1).all()
            assert (w >= 1).all()
            assert (top >= 0).all()
            assert (left >= 0).all()
            assert (top + h <= height).all()
            assert (left + w <= width).all()


def test_first_windows_follow_the_published_distribution() -> None:
    """Scale uniform in .2–1, ratio log-uniform in 3/4–4/3, on an image that all of them fit."""
    config = dataclasses.replace(CONFIG, max_scale=0.7)
    views = [draw_views(0, 0, p, 1000, 1000, config)[0] for p in range(2000)]
    windows = np.array([view.windows[0] for view in views], float)
    scale = windows[:, 2] * windows[:, 3] / 1e6
    ratio = np.log(windows[:, 3] / windows[:, 2])
    assert np.abs(np.quantile(scale, [0, 0.5, 1]) - [0.2, 0.45, 0.7]).max() < 0.015
    assert np.abs(np.quantile(ratio, [0, 0.5, 1]) - np.log([3 / 4, 1, 4 / 3])).max() < 0.03


def test_probabilities_and_ranges_of_colours() -> None:
    views = [v for p in range(2000) for v in draw_views(0, 0, p, 100, 100, CONFIG)]
    assert abs(np.mean([view.flip for view in views]) - 0.5) < 0.03
    grey = np.array([view.saturation == 0 for view in views])
    assert abs(grey.mean() - 0.2) < 0.025
    plain = np.array([view.brightness == 1 and view.hue == 0 for view in views])
    assert abs(plain.mean() - 0.2) < 0.025
    brightness = np.array([view.brightness for view in views])
    hue = np.array([view.hue for view in views])
    assert 0.6 <= brightness.min() < 0.62
    assert 1.38 < brightness.max() <= 1.4
    assert -36 <= hue.min() < -34
    assert 34 < hue.max() <= 36


def test_the_first_window_of_valid_coverage_is_taken() -> None:
    view = draw_views(0, 0, 0, 40, 40, CONFIG)[0]
    windows = np.array([[0, 0, 10, 10], [20, 20, 10, 10], [15, 15, 10, 10], [10, 10, 20, 20]])
    view = dataclasses.replace(view, windows=windows.astype(np.int32))
    mask = np.zeros((40, 40), np.uint8)
    mask[20:40, 20:40] = 3
    window, valid = choose_window(mask, view, CONFIG)  # 0 %, 100 %, then 25 %
    assert window.tolist() == [15, 15, 10, 10]
    assert valid


def test_ignored_pixels_do_not_cover_and_no_valid_window_is_said() -> None:
    view = draw_views(0, 0, 0, 40, 40, CONFIG)[0]
    for fill in (0, 255, 1):
        window, valid = choose_window(np.full((40, 40), fill, np.uint8), view, CONFIG)
        assert not valid
        assert window.tolist() == view.windows[-1].tolist()


def test_coverage_limits_are_inclusive_at_one_and_ninety_nine_percent() -> None:
    view = draw_views(0, 0, 0, 10, 10, CONFIG)[0]
    view = dataclasses.replace(view, windows=np.array([[0, 0, 10, 10]], np.int32))
    mask = np.zeros((10, 10), np.uint8)
    assert not choose_window(mask, view, CONFIG)[1]
    mask[0, 0] = 1
    assert choose_window(mask, view, CONFIG)[1]
    mask[:] = 1
    assert not choose_window(mask, view, CONFIG)[1]
    mask[0, 0] = 0
    assert choose_window(mask, view, CONFIG)[1]


def test_colour_matrix_keeps_grey_and_saturation_zero_is_grey() -> None:
    view = dataclasses.replace(
        draw_views(0, 0, 0, 9, 9, CONFIG)[0], brightness=1.2, contrast=0.7, saturation=0, hue=20.0
    )
    matrix, grey_gain = colour_matrix(view)
    red = matrix @ np.array([200.0, 10, 30])
    assert np.ptp(red) < 0.5
    assert red.mean() == pytest.approx(
        1.2 * 0.7 * (0.299 * 200 + 0.587 * 10 + 0.114 * 30), rel=0.01
    )
    assert grey_gain == pytest.approx(1.2 * 0.3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"candidates": 0},
        {"min_scale": 0.9, "max_scale": 0.5},
        {"max_scale": 1.5},
        {"min_coverage": 0.99, "max_coverage": 0.01},
        {"flip_probability": 2.0},
        {"hue": 0.7},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"views.{next(iter(wrong))}"):
        ViewConfig(**wrong)  # type: ignore[arg-type]
