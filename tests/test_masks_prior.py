"""Saliency without weights, and what becomes of a map: known pictures, scenes, any size."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.color import rgb2lab

from data_pipeline.errors import InputError, SampleError
from data_pipeline.masks.background_prior import (
    BackgroundPrior,
    PriorConfig,
    _boundary_connectivity,
    _Superpixels,
    predict_saliency,
)
from data_pipeline.masks.measures import measure
from data_pipeline.masks.postprocess import (
    PostprocessConfig,
    make_mask,
    otsu_threshold,
    twice_mean_threshold,
)
from data_pipeline.sources.scenes import render_scene

UInt8 = NDArray[np.uint8]
CONFIG = PriorConfig()


def disc(ground: Any, colour: Any, height: int = 60, width: int = 80) -> tuple[UInt8, Any]:
    """A disc in the middle of a plain ground, and its mask."""
    rows, columns = np.mgrid[:height, :width]
    inside = np.hypot(rows - 0.5 * height, columns - 0.5 * width) < height / 4
    image = np.empty((height, width, 3), np.uint8)
    image[:] = ground
    image[inside] = colour
    return image, inside


def overlap(mask: Any, truth: Any) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


# ---------------------------------------------------------------- the prior


def test_a_disc_on_a_plain_ground_is_found() -> None:
    image, inside = disc((40, 90, 200), (230, 180, 40))
    saliency = predict_saliency(image, CONFIG)
    assert (saliency.shape, saliency.dtype) == ((60, 80), np.float32)
    assert overlap(saliency >= 0.5, inside) > 0.9
    assert saliency[~inside].mean() < 0.05


def test_it_is_connection_to_the_border_that_makes_background() -> None:
    """A strip along the border stands out as much as the disc, but holds much of the border."""
    image, inside = disc((90, 90, 90), (230, 180, 40))
    image[:10] = (40, 60, 200)
    saliency = predict_saliency(image, CONFIG)
    assert saliency[inside].mean() > 0.8
    assert saliency[:10].mean() < 0.3


def test_a_ground_that_an_object_cuts_in_two_is_one() -> None:
    image = np.full((60, 80, 3), (60, 140, 60), np.uint8)
    image[:, 34:46] = (220, 60, 60)  # from border to border, but with little of it
    image[20:40, 24:56] = (220, 60, 60)
    saliency = predict_saliency(image, CONFIG)
    assert saliency[22:38, 28:52].mean() > 0.7
    assert max(saliency[:, :20].mean(), saliency[:, 60:].mean()) < 0.15


def strips(colours: list[float], border: list[bool]) -> _Superpixels:
    """Superpixels side by side, of these grey levels (CIE-Lab L) and places at the border."""
    count = len(colours)
    lab = np.zeros((count, 3))
    lab[:, 0] = colours
    numbers = np.arange(count)
    pairs = np.stack([numbers[:-1], numbers[1:]], 1)
    centres = np.stack([np.full(count, 0.5), (numbers + 0.5) / count], 1)
    return _Superpixels(numbers[None], lab, centres, np.ones(count), np.array(border), pairs)


def connectivity(regions: _Superpixels) -> Any:
    distance = np.abs(regions.colours[:, None, 0] - regions.colours[None, :, 0])
    return _boundary_connectivity(regions, distance)


def test_boundary_connectivity_is_border_by_root_of_area() -> None:
    """A ground that is cut in two is one; the object in between touches no border."""
    regions = strips([50, 50, 50, 95, 50, 50, 50], [True, False, False] + [False] * 3 + [True])
    expected = np.full(7, 2 / np.sqrt(6))
    expected[3] = 0
    np.testing.assert_allclose(connectivity(regions), expected, atol=0.02)


def test_a_ground_that_changes_slowly_is_one() -> None:
    regions = strips([10, 16, 22, 28, 34, 40], [True, False, False, False, False, False])
    np.testing.assert_allclose(connectivity(regions), 1 / np.sqrt(6), atol=1e-6)


def test_superpixels_keep_to_edges() -> None:
    image, inside = disc((40, 90, 200), (230, 180, 40))
    regions = _Superpixels.of(rgb2lab(image), 100)
    share = regions.mean(inside.astype(float))
    assert 70 < len(share) < 130
    assert regions.sizes[(share > 0.1) & (share < 0.9)].sum() < 0.02 * inside.size


def test_scenes_are_found_better_than_by_any_constant_guess() -> None:
    found = []
    for index in range(12):
        scene = render_scene(3, index, 96, 128)
        saliency = predict_saliency(scene.image, CONFIG)
        found.append(overlap(saliency >= otsu_threshold(saliency), scene.mask > 0))
    assert np.mean(found) > 0.6


def test_refinement_makes_it_better() -> None:
    def mean_iou(config: PriorConfig) -> float:
        values = []
        for index in range(12):
            scene = render_scene(3, index, 96, 128)
            saliency = np.round(255 * predict_saliency(scene.image, config)).astype(np.uint8)
            values.append(measure(saliency, scene.mask > 0).iou_curve[128])
        return float(np.mean(values))

    assert mean_iou(CONFIG) > mean_iou(PriorConfig(fine_superpixels=0)) + 0.05


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (2, 1), (3, 3), (1, 40), (40, 1), (9, 13), (3, 700)]
)
def test_pictures_of_any_size_have_a_map(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    saliency = predict_saliency(image, CONFIG)
    assert saliency.shape == shape
    assert saliency.dtype == np.float32
    assert np.isfinite(saliency).all()
    assert saliency.min() >= 0
    assert saliency.max() <= 1


@pytest.mark.parametrize("level", [0, 100, 255])
def test_where_nothing_stands_out_there_is_nothing(level: int) -> None:
    plain = np.full((40, 50, 3), level, np.uint8)
    assert not predict_saliency(plain, CONFIG).any()
    noise = np.random.default_rng(0).integers(-1, 2, (40, 50, 1))
    barely = np.clip(plain + noise, 0, 255).astype(np.uint8)
    assert not predict_saliency(barely, CONFIG).any()


def test_large_pictures_are_worked_on_at_a_bounded_size() -> None:
    small, inside = disc((40, 90, 200), (230, 180, 40), 120, 160)
    large = small.repeat(8, 0).repeat(8, 1)
    saliency = predict_saliency(large, PriorConfig(size=160))
    assert saliency.shape == (960, 1280)
    expected = predict_saliency(small, PriorConfig(size=160))
    np.testing.assert_allclose(saliency[4::8, 4::8], expected, atol=0.15)
    assert overlap(saliency >= 0.5, inside.repeat(8, 0).repeat(8, 1)) > 0.9


def test_a_picture_has_one_map_whatever_is_in_its_batch() -> None:
    images = [render_scene(3, index, 48, 64).image for index in range(3)]
    together = BackgroundPrior().predict(images)
    for image, saliency in zip(images, together, strict=True):
        np.testing.assert_array_equal(BackgroundPrior().predict([image])[0], saliency)


def test_the_name_tells_settings_apart() -> None:
    names = {BackgroundPrior(PriorConfig(size=size)).name for size in (300, 320)}
    assert len(names) == 2


# ---------------------------------------------------------------- thresholds


def test_otsu_parts_two_classes_and_twice_the_mean_is_bounded() -> None:
    values = np.concatenate([np.full(900, 0.1), np.full(100, 0.9)])
    assert 0.1 < otsu_threshold(values) <= 0.9
    assert twice_mean_threshold(values) == pytest.approx(0.36)
    assert twice_mean_threshold(np.full(10, 0.7)) == pytest.approx(0.7)
    assert otsu_threshold(np.full(10, 0.7)) == np.inf
    assert twice_mean_threshold(np.zeros(10)) == np.inf


def test_otsu_is_the_threshold_of_least_variance_within_the_classes() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.2, 0.1, 3000), rng.normal(0.7, 0.1, 700)])

    def spread(threshold: float) -> float:
        parts = values[values < threshold], values[values >= threshold]
        return sum(len(part) * float(part.var()) for part in parts if len(part))

    best = min(spread(threshold) for threshold in np.linspace(0, 1, 2001))
    assert spread(otsu_threshold(values)) == pytest.approx(best, rel=2e-3)


# ---------------------------------------------------------------- masks


def segments() -> NDArray[np.float64]:
    """20 × 50 with segments of 100, 12 and 3 pixels: 10%, 1.2% and 0.3%."""
    saliency = np.zeros((20, 50))
    saliency[0:3, 0:4] = 0.8
    saliency[5:15, 20:30] = 0.9
    saliency[18, 40:43] = 1.0
    return saliency


def test_segments_under_one_percent_are_dropped() -> None:
    mask = make_mask(segments(), PostprocessConfig(threshold=0.5))
    assert mask.dtype == np.uint8
    assert sorted(np.unique(mask)) == [0, 255]
    assert (mask > 0).sum() == 112
    assert not mask[18].any()
    assert (make_mask(segments(), PostprocessConfig(0.5, min_segment=0)) > 0).sum() == 115
    assert (make_mask(segments(), PostprocessConfig(0.5, min_segment=0.02)) > 0).sum() == 100
    assert (make_mask(segments(), PostprocessConfig(0.85)) > 0).sum() == 100


def test_segments_can_be_ids() -> None:
    mask = make_mask(segments(), PostprocessConfig(threshold=0.5, ids=True))
    assert np.bincount(mask.ravel()).tolist() == [888, 12, 100]
    assert (mask[5, 20], mask[0, 0]) == (2, 1)


def test_pixels_that_touch_by_a_corner_are_one_segment() -> None:
    saliency = np.zeros((20, 20))
    saliency[[3, 4, 5, 6], [3, 4, 5, 6]] = 1
    mask = make_mask(saliency, PostprocessConfig(threshold=0.5))
    assert (mask > 0).sum() == 4


@pytest.mark.parametrize(
    ("saliency", "config", "reason"),
    [
        (np.zeros((10, 10)), PostprocessConfig(), "nothing is salient"),
        (np.zeros((10, 10)), PostprocessConfig("mean"), "nothing is salient"),
        (np.full((10, 10), 0.3), PostprocessConfig(0.5), "nothing is salient"),
        (segments(), PostprocessConfig(0.95), "no segment of at least 0.01 of the picture"),
        (segments(), PostprocessConfig(0.5, min_mask=0.2), "the mask is under 0.2 of the picture"),
    ],
)
def test_pictures_with_too_little_are_skipped(
    saliency: Any, config: PostprocessConfig, reason: str
) -> None:
    with pytest.raises(SampleError) as caught:
        make_mask(saliency, config)
    assert caught.value.stage == "skip"
    assert caught.value.reason.startswith(reason)


def test_a_map_without_numbers_is_no_map() -> None:
    with pytest.raises(SampleError, match="no numbers") as caught:
        make_mask(np.full((4, 4), np.nan), PostprocessConfig())
    assert caught.value.stage == "predict"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"threshold": "half"},
            "--threshold is 'half'; it can be a number between 0 and 1, or one",
        ),
        ({"threshold": 1.5}, "--threshold is 1.5; it must be above 0"),
        ({"threshold": float("nan")}, "--threshold is nan"),
        ({"min_segment": 1.0}, "--min-segment is 1.0; it is a share"),
        ({"min_mask": -0.1}, "--min-mask is -0.1; it is a share"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PostprocessConfig(**options)
