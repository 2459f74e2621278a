"""Reading for evaluation: images as squares, with their labels."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import InputError, SampleError
from data_pipeline.labelled import LabelledSet
from data_pipeline.resize import Resize, centre, resize_image, resize_nearest
from data_pipeline.sample import Label, UInt8, decode_grey, decode_label, decode_rgb
from data_pipeline.views import IMAGENET_MEAN, IMAGENET_STD

_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True)
class WholeImage:
    """One image for evaluation.

    H × W is its original size; where the centre is cut out, S × S.

    Attributes:
        sample_id: number in its data set.
        key: of the sample.
        pixels: uint8 [3, S, S], resized, not normalised.
        label: int16 [H, W] class index, -1 where it is ignored.
        mask: uint8 [H, W] proposal ids, or None where the data set has none.
        image: uint8 [H, W, 3].
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
        resize: how (`resize_image`); crop cuts the centre out of image, label and mask.
    """

    def __init__(
        self, samples: LabelledSet, size: int, threads: int, resize: Resize = "opencv"
    ) -> None:
        self.samples = samples
        self.size = size
        self.threads = threads
        self.resize = resize

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
            # only sets without labels give none: all their pixels are of their one class
            unlabelled = np.zeros(image.shape[:2], np.int16)
            label = unlabelled if raw.label is None else decode_label(raw.label)
            mask = None if raw.mask is None else decode_grey(raw.mask, "mask")
            pixels = resize_image(image, self.size, self.resize)
        except SampleError as error:
            key = self.samples.key(sample_id)
            what = error.reason if key in error.reason else f"{self.samples}, {key}: {error}"
            raise InputError(
                f"{what}; evaluation needs every sample: {self.samples.remedy()}"
            ) from None
        if self.resize == "crop":
            size = (pixels.shape[1], pixels.shape[2])
            pixels = centre(pixels, self.size)
            image = pixels.permute(1, 2, 0).contiguous().numpy()
            label = self._cut(label, size)
            mask = None if mask is None else self._cut(mask, size)
        return WholeImage(sample_id, self.samples.key(sample_id), pixels, label, mask, image)

    def _cut(self, values: NDArray[_T], size: tuple[int, int]) -> NDArray[_T]:
        """The square in the middle of values [H, W] that are resized to `size`."""
        square: NDArray[_T] = centre(resize_nearest(torch.tensor(values), size), self.size).numpy()
        return square

    def batches(self, sample_ids: NDArray[np.int64], size: int) -> Iterator[list[WholeImage]]:
        """The images of these numbers, `size` at a time, read ahead by one batch."""
        parts = [sample_ids[i : i + size].tolist() for i in range(0, len(sample_ids), size)]
        with ThreadPoolExecutor(self.threads) as pool:
            current = [pool.submit(self.attempt, number) for number in parts[0]] if parts else []
            for following in [*parts[1:], []]:
                ahead = [pool.submit(self.attempt, number) for number in following]
                found = [image for future in current if (image := future.result()) is not None]
                if found:
                    yield found
                current = ahead

    def attempt(self, sample_id: int) -> WholeImage | None:
        """What `batches` takes of a sample; None leaves it out, which only subclasses do."""
        return self.read(sample_id)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] to float32, normalised with ImageNet's mean and deviation."""
    mean = 255 * torch.tensor(IMAGENET_MEAN, device=pixels.device)[:, None, None]
    std = 255 * torch.tensor(IMAGENET_STD, device=pixels.device)[:, None, None]
    return (pixels.float() - mean) / std
