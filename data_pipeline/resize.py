"""Resizing for evaluation: images to the network's size, labels too, and predictions back.

The published evaluations resize with OpenCV (cubic for images, nearest for labels and predictions);
what it does is done here without it (docs/evaluation.md says how closely).
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sample import UInt8

Resize = Literal["opencv", "antialias", "crop"]
RESIZES = ("opencv", "antialias", "crop")
_LONGEST = 1 << 14  # pixels of a side


def require_resize(name: str) -> None:
    """Raises InputError unless `name` is one of `RESIZES`."""
    if name not in RESIZES:
        raise InputError(f"--resize is {name!r}; it can be {', '.join(RESIZES)}")


def resize_image(image: UInt8, size: int, how: Resize = "opencv") -> Tensor:
    """An image [H, W, 3] at the network's size: uint8 [3, h, w].

    Args:
        image: RGB.
        size: S, pixels.
        how: opencv: S × S as OpenCV's INTER_CUBIC does it (a = −.75, no antialiasing); antialias:
            S × S by a cubic with a = −.5 that averages where it shrinks; crop: as opencv, but the
            shorter side becomes S and the ratio stays (`centre` then cuts the square).

    Raises:
        SampleError: the longer side would be out of all bounds.
    """
    pixels = torch.tensor(image).permute(2, 0, 1)
    if how == "antialias":
        resized: Tensor = transforms.resize(
            pixels, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        return resized
    target = (size, size)
    if how == "crop":
        height, width = pixels.shape[1:]
        shorter = min(height, width)
        target = (size * height // shorter, size * width // shorter)
        if max(target) > _LONGEST:
            raise SampleError("image", f"{width}×{height} is too long to keep its ratio")
    cubic = F.interpolate(pixels[None].float(), target, mode="bicubic", align_corners=False)[0]
    return cubic.round_().clamp_(0, 255).to(torch.uint8)


def centre(values: Tensor, size: int) -> Tensor:
    """The square [..., S, S] in the middle of [..., h, w]."""
    top, left = (round((side - size) / 2) for side in values.shape[-2:])
    return values[..., top : top + size, left : left + size]


def resize_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Values [..., H, W] to [..., h, w]: row i is row ⌊i · H / h⌋, as OpenCV's INTER_NEAREST."""
    rows, columns = (
        torch.from_numpy(_sources(old, new)).to(values.device)
        for old, new in zip(values.shape[-2:], size, strict=True)
    )
    return values[..., rows[:, None], columns]


def _sources(old: int, new: int) -> NDArray[np.int64]:
    # two divisions, as there: where i · old / new is whole, rounding decides
    step = 1.0 / (new / old)
    sources: NDArray[np.int64] = np.floor(np.arange(new) * step).astype(np.int64)
    return sources.clip(max=old - 1)
