"""Random changes of labelled images for classifiers: pure functions of seed, epoch and image."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from data_pipeline.order import generator
from data_pipeline.resize import Resize, resize_image, resize_nearest
from data_pipeline.whole_images import WholeImage

_AUGMENT, _COLOUR = 12, 14  # streams of the generator


def augmented(
    image: WholeImage, size: int, seed: int, epoch: int, resize: Resize = "opencv"
) -> tuple[Tensor, Tensor]:
    """Flip, ±5° and scale .75–1.25, then resized: pixels uint8 [3, S, S] and label int16 [S, S].

    As published it is the original image that is turned, and what comes from outside it is black,
    and background in the label.
    """
    draw = generator(seed, _AUGMENT, epoch, image.sample_id)
    flip, angle, scale = draw.random() < 0.5, draw.uniform(-5, 5), draw.uniform(0.75, 1.25)
    pixels, label = torch.tensor(image.image).permute(2, 0, 1), torch.tensor(image.label)[None]
    if flip:
        pixels, label = pixels.flip(-1), label.flip(-1)
    pixels, label = turned(pixels, label, angle, scale)
    square = resize_image(pixels.permute(1, 2, 0).numpy(), size, resize)
    return square, resize_nearest(label[0], (size, size))


def turned(pixels: Tensor, label: Tensor, angle: float, scale: float) -> tuple[Tensor, Tensor]:
    """Turned around the centre and scaled, 0 from outside; cubic (a = −.75), the label nearest.

    Args:
        pixels: uint8 [3, H, W].
        label: int16 [1, H, W].
        angle: degrees.
        scale: above 1 enlarges.
    """
    height, width = label.shape[1:]
    # where each pixel comes from, from the centre: [H, W, (x, y)]
    y, x = np.mgrid[:height, :width] - np.reshape([height - 1, width - 1], (2, 1, 1)) / 2
    cosine, sine = np.cos(np.radians(angle)) / scale, np.sin(np.radians(angle)) / scale
    source = np.stack([cosine * x - sine * y, sine * x + cosine * y], -1)
    grid = torch.from_numpy((2 * source / (width, height)).astype(np.float32))[None]

    def moved(values: Tensor, mode: str) -> Tensor:
        return F.grid_sample(values[None].float(), grid, mode, "zeros", align_corners=False)[0]

    cubic = moved(pixels, "bicubic").round_().clamp_(0, 255)
    return cubic.to(torch.uint8), moved(label, "nearest").to(torch.int16)


def recoloured(pixels: Tensor, sample_id: int, seed: int, epoch: int) -> Tensor:
    """Brightness, contrast and saturation times .75–1.25 each: uint8 [3, S, S]."""
    brightness, contrast, saturation = generator(seed, _COLOUR, epoch, sample_id).uniform(
        0.75, 1.25, 3
    )
    pixels = transforms.adjust_brightness(pixels, brightness)
    pixels = transforms.adjust_contrast(pixels, contrast)
    changed: Tensor = transforms.adjust_saturation(pixels, saturation)
    return changed
