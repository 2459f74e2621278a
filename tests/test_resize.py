"""Resizing against the published steps, and against values that OpenCV gave."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from data_pipeline.errors import InputError, SampleError
from data_pipeline.resize import (
    Resize,
    centre,
    require_resize,
    resize_image,
    resize_nearest,
)
from data_pipeline.sample import decode_grey, decode_label, decode_rgb
from data_pipeline.whole_images import WholeImages
from tests.evaluation_data import block_shards
from tests.published_steps import opencv_cubic, opencv_nearest

SIZES = [((37, 50), 40), ((50, 33), 51), ((64, 48), 32), ((9, 9), 16), ((1, 5), 8)]


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)


def resized(image: NDArray[np.uint8], size: int, how: Resize) -> NDArray[np.int64]:
    pixels = resize_image(image, size, how)
    assert pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy().astype(np.int64)


@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_images_are_resized_as_by_opencv(shape: tuple[int, int], size: int) -> None:
    image = noise(*shape)
    found = resized(image, size, "opencv")
    plain = opencv_cubic(image, size, size, fixed=False)
    assert np.abs(found - plain).max() <= 1
    assert (found != plain).mean() < 2e-3, "all but ties"
    fixed = opencv_cubic(image, size, size, fixed=True)
    assert np.abs(found - fixed).max() <= 1
    assert (found != fixed).mean() < 0.08


def test_values_that_opencv_gave() -> None:
    """Of cv2 4.11 and 5.0: a step, and a comb made smaller, which antialiasing would average."""
    step = np.repeat(np.uint8([[0, 0, 100, 100]]), 3, 0)[..., None].repeat(3, 2)
    assert resized(step, 8, "opencv")[0, :, 0].tolist() == [0, 0, 0, 23, 77, 111, 104, 100]
    comb = np.uint8([[0, 255] * 6])[..., None].repeat(3, 2).repeat(4, 0)
    assert resized(comb, 4, "opencv")[0, :, 0].tolist() == [255, 0, 255, 0]
    labels = torch.arange(7)[None]
    assert resize_nearest(labels, (1, 5))[0].tolist() == [0, 1, 2, 4, 5]
    assert resize_nearest(labels, (2, 10)).tolist() == [[0, 0, 1, 2, 2, 3, 4, 4, 5, 6]] * 2


def test_ours_antialiases_and_is_an_option() -> None:
    comb = np.uint8([[0, 255] * 20])[..., None].repeat(3, 2).repeat(8, 0)
    found = resized(comb, 8, "antialias")  # every fifth
    assert np.abs(found[:, 1:-1] - 127.5).max() < 10, "an average"
    expected = transforms.resize(
        torch.tensor(comb).permute(2, 0, 1), [8, 8], InterpolationMode.BICUBIC, antialias=True
    )
    assert found.tolist() == expected.permute(1, 2, 0).tolist()
    assert resized(comb, 8, "opencv")[0, :, 0].tolist() == [0, 255] * 4
    with pytest.raises(InputError, match="--resize is 'cubic'; it can be opencv, antialias, crop"):
        require_resize("cubic")


@pytest.mark.parametrize(("shape", "size"), [*SIZES, ((40, 40), 49), ((60, 30), 40)])
def test_labels_take_the_pixel_that_opencv_takes(shape: tuple[int, int], size: int) -> None:
    label = np.random.default_rng(1).integers(-1, 20, shape).astype(np.int16)
    found = resize_nearest(torch.from_numpy(label), (size, size + 3))
    assert found.dtype == torch.int16
    assert found.tolist() == opencv_nearest(label, size, size + 3).tolist()
    several = resize_nearest(torch.from_numpy(np.stack([label, label + 1])), (size, size + 3))
    assert several.tolist() == torch.stack([found, found + 1]).tolist()


@pytest.mark.parametrize("shape", [(48, 64), (66, 44), (40, 40)])
def test_the_centre_is_cut_out_of_image_label_and_mask(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    blocks = block_shards(tmp_path, [1, 2], shape)
    images = WholeImages(blocks, 32, 1, "crop")
    for number in (0, 1):
        found, stored = images.read(number), blocks.read(number)
        image, label = decode_rgb(stored.image), decode_label(stored.label or b"")
        height, width = shape
        tall = height * 32 // min(shape)
        wide = width * 32 // min(shape)
        top, left = (tall - 32) // 2, (wide - 32) // 2
        window = (slice(top, top + 32), slice(left, left + 32))
        expected = opencv_cubic(image, tall, wide, fixed=False)[window].astype(np.int64)
        assert np.abs(found.image - expected).max() <= 1
        assert (found.image != expected).mean() < 2e-3
        assert found.pixels.permute(1, 2, 0).tolist() == found.image.tolist()
        assert found.label.tolist() == opencv_nearest(label, tall, wide)[window].tolist()
        mask = decode_grey(stored.mask or b"", "mask")
        assert found.mask is not None
        assert found.mask.tolist() == opencv_nearest(mask, tall, wide)[window].tolist()


def test_a_strip_does_not_grow_out_of_memory() -> None:
    strip = np.zeros((1, 400, 3), np.uint8)
    with pytest.raises(SampleError, match="400×1 is too long to keep its ratio"):
        resize_image(strip, 320, "crop")
    assert resize_image(strip, 32, "crop").shape == (3, 32, 12800)
    assert centre(torch.zeros(32, 12800), 32).shape == (32, 32)
