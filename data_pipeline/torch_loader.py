"""The reference loader: PIL and torchvision, and what runs where DALI has no wheel."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError, SampleError
from data_pipeline.fetch import FetchedSample
from data_pipeline.sample import decode_rgb
from data_pipeline.views import GREY_WEIGHTS, IMAGENET_MEAN, IMAGENET_STD, View, colour_matrix


class TorchLoader:
    """Decodes and augments on the CPU.

    Args:
        image_size: side S of the views, pixels.
        threads: samples worked on at a time.
        device: where the batch goes; for a GPU it is copied from pinned memory.
    """

    def __init__(self, image_size: int, threads: int, device: torch.device) -> None:
        self.image_size = image_size
        self.device = device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="augment")

    def load(self, samples: Sequence[FetchedSample]) -> Batch:
        """Two views of every sample."""
        rows = list(self._pool.map(self._load_one, samples))
        images = [torch.stack([row[view] for row in rows]) for view in (0, 1)]
        masks = [torch.stack([row[view] for row in rows]) for view in (2, 3)]
        sample_ids = torch.tensor([sample.sample_id for sample in samples])
        # stacked as [B, S, S, 3], so that the permuted view is channels-last without a copy
        fields = (*(image.permute(0, 3, 1, 2) for image in images), *masks, sample_ids)
        if self.device.type == "cuda":
            return Batch(*(field.pin_memory() for field in fields)).to(self.device)
        return Batch(*fields)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _load_one(self, sample: FetchedSample) -> tuple[Tensor, ...]:
        try:
            pixels = decode_rgb(sample.image.tobytes())
        except SampleError as error:
            raise InputError(
                f"{sample.name} passed its checksum, but {error}; build its shard again"
            ) from None
        image = torch.tensor(pixels).permute(2, 0, 1)
        images = [augment_image(image, view, self.image_size) for view in sample.views]
        masks = [
            crop_mask(torch.tensor(sample.view_mask(number)), view, self.image_size)
            for number, view in enumerate(sample.views)
        ]
        return (*images, *masks)


def augment_image(image: Tensor, view: View, size: int) -> Tensor:
    """Crop, resize, colour, flip, normalise: uint8 [3, H, W] to float32 [size, size, 3]."""
    top, left, height, width = view.windows[0].tolist()
    crop = F.resize(
        image[:, top : top + height, left : left + width],
        [size, size],
        interpolation=InterpolationMode.BILINEAR,
        antialias=True,
    )
    if view.flip:
        crop = crop.flip(-1)
    pixels = crop.permute(1, 2, 0).float()
    matrix, grey_gain = colour_matrix(view)
    grey_mean = pixels.mean((0, 1)) @ torch.tensor(GREY_WEIGHTS)
    coloured = pixels @ torch.from_numpy(matrix.T.astype(np.float32)) + grey_gain * grey_mean
    mean, std = 255 * torch.tensor(IMAGENET_MEAN), 255 * torch.tensor(IMAGENET_STD)
    normalised: Tensor = (coloured.clamp(0, 255) - mean) / std
    return normalised


def crop_mask(mask: Tensor, view: View, size: int) -> Tensor:
    """Crop, resize to the nearest pixel, flip: uint8 [H, W] to uint8 [size, size]."""
    top, left, height, width = view.windows[0].tolist()
    crop: Tensor = F.resize(
        mask[None, top : top + height, left : left + width],
        [size, size],
        interpolation=InterpolationMode.NEAREST_EXACT,
    )[0]
    return crop.flip(-1) if view.flip else crop
