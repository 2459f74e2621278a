from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest

from data_pipeline.sources.scenes import (
    CLASSES,
    MAX_TOTAL_AREA,
    MIN_OBJECT_AREA,
    VOID,
    Scene,
    render_scene,
    scene_size,
)

SIZES = [(64, 64), (128, 96), (37, 91), (91, 37), (16, 16)]


@cache
def series(height: int, width: int, count: int) -> tuple[Scene, ...]:
    return tuple(render_scene(7, index, height, width) for index in range(count))


def shown_classes(scene: Scene) -> set[int]:
    return set(np.unique(scene.label).tolist()) - {0, VOID}


def test_classes_are_distinct_and_start_with_the_background() -> None:
    assert CLASSES[0] == "background"
    assert len(CLASSES) == len(set(CLASSES)) == 11


def test_same_arguments_give_the_same_scene_in_any_order() -> None:
    first = render_scene(3, 5, 48, 64)
    render_scene(3, 6, 48, 64)
    again = render_scene(3, 5, 48, 64)
    for field in ("image", "mask", "label"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))


@pytest.mark.parametrize(("seed", "index"), [(3, 6), (4, 5), (5, 3), (-3, 5)])
def test_another_seed_or_index_gives_another_scene(seed: int, index: int) -> None:
    one = render_scene(3, 5, 48, 64).image.astype(int)
    other = render_scene(seed, index, 48, 64).image.astype(int)
    # Two unrelated pictures differ by tens of grey levels, noise alone would by a few.
    assert np.abs(one - other).mean() > 10


def test_size_draws_do_not_shift_the_scene() -> None:
    expected = render_scene(0, 9, 32, 40).image
    scene_size(0, 9, 32)
    np.testing.assert_array_equal(render_scene(0, 9, 32, 40).image, expected)


def test_seed_and_index_beyond_64_bits_wrap() -> None:
    np.testing.assert_array_equal(
        render_scene(2**64 + 1, 2, 24, 24).image, render_scene(1, 2, 24, 24).image
    )


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_shapes_dtypes_and_values(height: int, width: int) -> None:
    for scene in series(height, width, 12):
        assert scene.image.shape == (height, width, 3)
        assert scene.mask.shape == scene.label.shape == (height, width)
        assert scene.image.dtype == scene.mask.dtype == scene.label.dtype == np.uint8
        assert set(np.unique(scene.label)) <= {*range(len(CLASSES)), VOID}
        assert scene.image.std() > 8


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_masks_agree_with_labels(height: int, width: int) -> None:
    for scene in series(height, width, 12):
        ids = np.unique(scene.mask).tolist()
        assert ids in ([0, 1], [0, 1, 2])
        assert (scene.label[scene.mask > 0] > 0).all()
        for number in ids[1:]:
            inside = scene.label[scene.mask == number]
            assert len(set(inside.tolist()) - {0, VOID}) == 1
        areas = np.bincount(scene.mask.ravel())[1:] / scene.mask.size
        assert areas.min() >= MIN_OBJECT_AREA
        assert areas.sum() <= MAX_TOTAL_AREA


def test_proposals_match_objects_up_to_the_border() -> None:
    for scene in series(128, 96, 12):
        core = (scene.label > 0) & (scene.label != VOID)
        assert (scene.mask > 0)[core].mean() > 0.9
    # An imperfect border: somewhere the proposal takes in void pixels, elsewhere it leaves some.
    void = np.concatenate([scene.mask[scene.label == VOID] > 0 for scene in series(128, 96, 12)])
    assert 0.3 < void.mean() < 0.8


def test_void_is_a_thin_ring_around_objects() -> None:
    for scene in series(128, 96, 12):
        void = scene.label == VOID
        # A 5 x 5 block of nothing but void would be wider than two pixels on each side.
        blocks = np.lib.stride_tricks.sliding_window_view(void, (5, 5)).all((2, 3))
        assert void.any()
        assert not blocks.any()
        # No pixel of an object touches the background without void in between.
        for a, b in (
            (scene.label[:, 1:], scene.label[:, :-1]),
            (scene.label[1:], scene.label[:-1]),
        ):
            assert not ((a != b) & (a != VOID) & (b != VOID)).any()


def test_two_hundred_scenes_show_every_class_about_equally_often() -> None:
    scenes = series(32, 32, 200)
    shown = Counter(kind for scene in scenes for kind in shown_classes(scene))
    assert sorted(shown) == list(range(1, len(CLASSES)))
    # 200 scenes with 1.3 objects each over ten classes: 26 expected, five sigma is about 24.
    assert min(shown.values()) >= 10
    assert max(shown.values()) <= 50


def test_some_scenes_hold_two_objects_of_different_or_of_the_same_class() -> None:
    pairs = [scene for scene in series(32, 32, 200) if scene.mask.max() == 2]
    assert 0.18 < len(pairs) / 200 < 0.42
    assert {len(shown_classes(scene)) for scene in pairs} == {1, 2}


def test_mean_brightness_gives_neither_the_class_nor_the_foreground() -> None:
    scenes = series(32, 32, 200)
    gaps = [
        float(scene.image[scene.mask > 0].mean()) - float(scene.image[scene.mask == 0].mean())
        for scene in scenes
    ]
    brighter = float(np.mean(np.array(gaps) > 0))
    assert 0.25 < brighter < 0.75


def test_sides_below_the_minimum_are_refused() -> None:
    assert render_scene(0, 0, 8, 8).image.shape == (8, 8, 3)
    with pytest.raises(ValueError, match="at least 8 pixels, got 7x64"):
        render_scene(0, 0, 7, 64)


def test_extreme_aspect_ratios_still_render() -> None:
    for index in range(6):
        scene = render_scene(1, index, 8, 300)
        assert set(np.unique(scene.mask)) <= {0, 1, 2}
        assert (scene.label[scene.mask > 0] > 0).all()


def test_scene_sizes_mix_orientations_around_the_base() -> None:
    sizes = np.array([scene_size(0, index, 128) for index in range(200)])
    height, width = sizes.T
    assert [scene_size(0, index, 128) for index in range(5)] == [
        tuple(s) for s in sizes[:5].tolist()
    ]
    assert (width > height).mean() > 0.25
    assert (width < height).mean() > 0.15
    assert (width == height).mean() > 0.1
    assert np.sqrt(height * width).min() > 0.86 * 128
    assert np.sqrt(height * width).max() < 1.14 * 128
    assert (np.maximum(height, width) / np.minimum(height, width)).max() < 1.55
    assert len({tuple(s) for s in sizes.tolist()}) > 50
    assert min(scene_size(0, 0, 2)) >= 8
