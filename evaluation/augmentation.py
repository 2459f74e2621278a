"""Random changes of labelled images for classifiers: pure functions of seed, epoch and image."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from data_pipeline.order import generator
from data_pipeline.resize import resize_nearest
from data_pipeline.sample import IGNORED
from data_pipeline.whole_images import WholeImage

_AUGMENT, _COLOUR = 12, 14  # streams of the generator


def augmented(image: WholeImage, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Flip, ±5° and scale .75–1.25: pixels uint8 [3, S, S] and label int16 [S, S]."""
    draw = generator(seed, _AUGMENT, epoch, image.sample_id)
    flip, angle, scale = draw.random() < 0.5, draw.uniform(-5, 5), draw.uniform(0.75, 1.25)
    label = resize_nearest(torch.tensor(image.label), (size, size))[None]
    pixels = image.pixels
    if flip:
        pixels, label = pixels.flip(-1), label.flip(-1)
    moved = {"angle": angle, "translate": [0, 0], "scale": scale}
    pixels = transforms.affine(
        pixels, **moved, shear=[0.0, 0.0], interpolation=InterpolationMode.BILINEAR
    )
    label = transforms.affine(
        label, **moved, shear=[0.0, 0.0], interpolation=InterpolationMode.NEAREST, fill=[IGNORED]
    )
    return pixels, label[0]


def recoloured(pixels: Tensor, sample_id: int, seed: int, epoch: int) -> Tensor:
    """Brightness, contrast and saturation times .75–1.25 each: uint8 [3, S, S]."""
    brightness, contrast, saturation = generator(seed, _COLOUR, epoch, sample_id).uniform(
        0.75, 1.25, 3
    )
    pixels = transforms.adjust_brightness(pixels, brightness)
    pixels = transforms.adjust_contrast(pixels, contrast)
    changed: Tensor = transforms.adjust_saturation(pixels, saturation)
    return changed
