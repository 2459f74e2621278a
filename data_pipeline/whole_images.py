"""Reading for evaluation: whole images, resized to a square, with their labels as they are."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_pipeline.errors import InputError, SampleError
from data_pipeline.labelled import LabelledSet
from data_pipeline.sample import Label, UInt8, decode_grey, decode_label, decode_rgb
from data_pipeline.views import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class WholeImage:
    """One image for evaluation.

    Attributes:
        sample_id: number in its data set.
        key: of the sample.
        pixels: uint8 [3, S, S], resized (bicubic), not normalised.
        label: int16 [H, W] class index at original resolution, -1 where it is ignored.
        mask: uint8 [H, W] proposal ids, or None where the data set has none.
        image: uint8 [H, W, 3] at original resolution.
    """

    sample_id: int
    key: str
    pixels: Tensor
    label: Label
    mask: UInt8 | None
    image: UInt8


class WholeImages:
    """Labelled images by number.

    Args:
        samples: where they are.
        size: side S that images are resized to, pixels.
        threads: images read and decoded at a time.
    """

    def __init__(self, samples: LabelledSet, size: int, threads: int) -> None:
        self.samples = samples
        self.size = size
        self.threads = threads

    @property
    def classes(self) -> tuple[str, ...]:
        return self.samples.classes

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, sample_id: int) -> WholeImage:
        """One image.

        Raises:
            InputError: it cannot be read; an evaluation without it would be another one.
        """
        try:
            raw = self.samples.read(sample_id)
            image = decode_rgb(raw.image)
            label = decode_label(raw.label or b"")
            mask = None if raw.mask is None else decode_grey(raw.mask, "mask")
        except SampleError as error:
            key = self.samples.key(sample_id)
            what = error.reason if key in error.reason else f"{self.samples}, {key}: {error}"
            raise InputError(
                f"{what}; evaluation needs every sample: {self.samples.remedy()}"
            ) from None
        pixels = F.resize(
            torch.tensor(image).permute(2, 0, 1),
            [self.size, self.size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
        return WholeImage(sample_id, self.samples.key(sample_id), pixels, label, mask, image)

    def batches(self, sample_ids: NDArray[np.int64], size: int) -> Iterator[list[WholeImage]]:
        """The images of these numbers, `size` at a time, read ahead by one batch."""
        parts = [sample_ids[i : i + size].tolist() for i in range(0, len(sample_ids), size)]
        with ThreadPoolExecutor(self.threads) as pool:
            current = [pool.submit(self.read, number) for number in parts[0]] if parts else []
            for following in [*parts[1:], []]:
                ahead = [pool.submit(self.read, number) for number in following]
                if current:
                    yield [future.result() for future in current]
                current = ahead


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] to float32, normalised with ImageNet's mean and deviation."""
    mean = 255 * torch.tensor(IMAGENET_MEAN, device=pixels.device)[:, None, None]
    std = 255 * torch.tensor(IMAGENET_STD, device=pixels.device)[:, None, None]
    return (pixels.float() - mean) / std


def resize_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Integers [H, W] to [*size], each pixel the nearest one."""
    resized: Tensor = F.resize(
        values[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT
    )[0]
    return resized
