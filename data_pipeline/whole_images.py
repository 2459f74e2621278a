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
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import Manifest
from data_pipeline.reader import SampleReader
from data_pipeline.sample import UInt8, decode_grey, decode_rgb
from data_pipeline.views import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class WholeImage:
    """One image for evaluation.

    Attributes:
        sample_id: number in its data set.
        key: of the sample.
        pixels: uint8 [3, S, S], resized (bicubic), not normalised.
        label: uint8 [H, W] class index at original resolution, 255 ignored.
        mask: uint8 [H, W] proposal ids, or None where the shards have none.
    """

    sample_id: int
    key: str
    pixels: Tensor
    label: UInt8
    mask: UInt8 | None


class WholeImages:
    """Labelled images of a set of shards by number.

    Args:
        manifest: every sample must have a label.
        size: side S that images are resized to, pixels.
        threads: images read and decoded at a time.
    """

    def __init__(self, manifest: Manifest, size: int, threads: int) -> None:
        self.manifest = manifest
        self.size = size
        self.threads = threads
        self._reader = SampleReader(DatasetIndex(manifest))

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, sample_id: int) -> WholeImage:
        """One image.

        Raises:
            InputError: it cannot be read; an evaluation without it would be another one.
        """
        shard, sample = self._reader.index.locate(sample_id)
        name = self._reader.describe(shard, sample)
        try:
            raw = self._reader.read(shard, sample, label=True)
            if raw.label is None:
                raise SampleError("label", f"{name} has no label")
            image = torch.tensor(decode_rgb(raw.image)).permute(2, 0, 1)
            label = decode_grey(raw.label, "label")
            mask = None if raw.mask is None else decode_grey(raw.mask, "mask")
        except SampleError as error:
            what = error.reason if name in error.reason else f"{name}: {error}"
            raise InputError(
                f"{self.manifest.root / what}; evaluation needs every sample: copy the shard here "
                "again or build the shards again"
            ) from None
        pixels = F.resize(
            image, [self.size, self.size], interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        return WholeImage(sample_id, name.partition(":")[2], pixels, label, mask)

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
