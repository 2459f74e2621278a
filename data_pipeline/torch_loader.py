"""The loader for CPUs: simplejpeg and torch's 8-bit resize, one pass over floats a view.

What DALI's graph does operator by operator is folded here: colour and normalisation are one matrix
product and one clamp, written into the batch itself. On CPUs that takes half of our DALI graph's
time at 224 pixels (`benchmarks/loader.py`); it also runs where DALI has no wheel.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError, SampleError
from data_pipeline.fetch import FetchedSample
from data_pipeline.pieces import map_in_pieces, single_threaded_pool
from data_pipeline.sample import IGNORE, UInt8, decode_rgb
from data_pipeline.views import GREY_WEIGHTS, IMAGENET_MEAN, IMAGENET_STD, View, colour_matrix

_resize = torch.ops.aten._upsample_bilinear2d_aa.out  # bilinear, with antialiasing
_MEAN, _STD = 255 * np.array(IMAGENET_MEAN), 255 * np.array(IMAGENET_STD)


class TorchLoader:
    """Decodes and augments on the CPU.

    Args:
        image_size: side S of the views, pixels.
        threads: samples worked on at a time.
        device: where the batch goes; for a GPU it is made in pinned memory and copied.
    """

    def __init__(self, image_size: int, threads: int, device: torch.device) -> None:
        self.image_size = image_size
        self.device = device
        self._threads = threads
        self._pool = single_threaded_pool(threads)
        self._local = threading.local()

    def load(self, samples: Sequence[FetchedSample]) -> Batch:
        """Two views of every sample."""
        size, pinned = self.image_size, self.device.type == "cuda"
        # images lie as [B, S, S, 3], so that the permuted view is channels-last without a copy
        images = torch.empty((2, len(samples), size, size, 3), pin_memory=pinned)
        masks = torch.empty((2, len(samples), size, size), dtype=torch.uint8, pin_memory=pinned)
        map_in_pieces(
            self._pool,
            self._threads,
            lambda n: self._load_one(samples[n], images[:, n], masks[:, n]),
            range(len(samples)),
        )
        sample_ids = torch.tensor([sample.sample_id for sample in samples])
        query, key = images.permute(0, 1, 4, 2, 3)
        batch = Batch(query, key, masks[0], masks[1], sample_ids)
        return batch.to(self.device) if pinned else batch

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _load_one(self, sample: FetchedSample, images: Tensor, masks: Tensor) -> None:
        try:
            pixels = decode_rgb(sample.image.tobytes())
        except SampleError as error:
            raise InputError(
                f"{sample.name} passed its checksum, but {error}; build its shard again"
            ) from None
        scratch = getattr(self._local, "scratch", None)
        if scratch is None:  # allocating it for each view would cost more than filling it
            scratch = self._local.scratch = Scratch(self.image_size)
        for view, image, mask, valid in zip(
            sample.views, images, masks.numpy(), sample.valid, strict=True
        ):
            augment_image(pixels, view, scratch, image)
            mask[...] = crop_mask(sample.mask, view, len(mask)) if valid else IGNORE


class Scratch:
    """Memory that a thread works in, view after view, and what is the same for all views.

    Args:
        size: side S of the views, pixels.

    Attributes:
        resized: uint8 [1, 3, S, S], channels-last: torch's resize then packs nothing.
        image: uint8 [S, S, 3], the same memory.
        pixels: float32 [S, S, 3].
        triples, rows: the same memory as [S·S, 3] and as [S, 3·S].
        grey: float32 [3·S], weights of a row whose sum is that of its grey values.
        lowest, highest: float32 [3·S], a row of black and of white, normalised.
    """

    def __init__(self, size: int) -> None:
        layout = torch.channels_last
        self.resized = torch.empty((1, 3, size, size), dtype=torch.uint8, memory_format=layout)
        self.image = self.resized[0].permute(1, 2, 0)
        self.pixels = torch.empty((size, size, 3))
        self.triples, self.rows = self.pixels.view(-1, 3), self.pixels.view(size, -1)
        self.grey = _float(np.tile(GREY_WEIGHTS, size))
        self.lowest = _float(np.tile(-_MEAN / _STD, size))
        self.highest = _float(np.tile((255 - _MEAN) / _STD, size))


def augment_image(pixels: UInt8, view: View, scratch: Scratch, output: Tensor) -> None:
    """Crop, resize, colour, flip, normalise.

    Calls of torch are few: each lets the other threads in, which costs as much as a small one.

    Args:
        pixels: uint8 [H, W, 3].
        view: with one window.
        scratch: of the same side S; overwritten.
        output: float32 [S, S, 3], contiguous, where the view goes.
    """
    size = len(output)
    top, left, height, width = view.windows[0].tolist()
    crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    # F.interpolate's own kernel; it gives its result a planar layout if it makes one itself
    planes = torch.from_numpy(crop.transpose(2, 0, 1)[None])
    _resize(planes, [size, size], False, out=scratch.resized)
    scratch.pixels.copy_(scratch.image.flip(1) if view.flip else scratch.image)
    mean = float(torch.mv(scratch.rows, scratch.grey).sum()) / size**2
    matrix, grey_gain = colour_matrix(view)
    torch.mm(scratch.triples, _float((matrix / _STD[:, None]).T), out=output.view(-1, 3))
    # rows of S pixels keep the vector units full where rows of 3 numbers would not
    rows = output.view(size, -1)
    rows.add_(_float(np.tile((grey_gain * mean - _MEAN) / _STD, size)))
    rows.clamp_(scratch.lowest, scratch.highest)


def crop_mask(mask: UInt8, view: View, size: int) -> UInt8:
    """Crop, resize to the nearest pixel, flip: uint8 [H, W] to uint8 [size, size]."""
    top, left, height, width = view.windows[0].tolist()
    centres = np.arange(size, dtype=np.float32) + np.float32(0.5)
    rows, columns = (
        (centres * np.float32(side / size)).astype(np.int64).clip(0, side - 1)
        for side in (height, width)
    )
    if view.flip:
        columns = columns[::-1]
    # all are inside: "clip" only spares their check
    cropped: UInt8 = mask.take(top + rows, 0, mode="clip").take(left + columns, 1, mode="clip")
    return cropped


def _float(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
