"""The fast loader: NVIDIA DALI, on the CPU, or with decoding and augmentation on a GPU (mixed).

DALI draws nothing: crops, colours and flips come in as arguments (`views.py`), so that its output
is the same for any number of threads and ranks, and after any resume.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from data_pipeline.fetch import FetchedSample
from data_pipeline.views import GREY_WEIGHTS, IMAGENET_MEAN, IMAGENET_STD, View

fn: Any = dali.fn
types: Any = dali.types

_VIEW_NAMES = ("query", "key")
_COLOUR_CENTRE = 128.0  # the fixed centre of color_twist's contrast on 8-bit images


class DaliLoader:
    """Decodes and augments with one DALI graph.

    Args:
        batch_size: samples a call at the most.
        image_size: side S of the views, pixels.
        threads: of DALI.
        device: a CPU runs the graph without a driver; a GPU decodes JPEG and augments there.
    """

    def __init__(
        self, batch_size: int, image_size: int, threads: int, device: torch.device
    ) -> None:
        self.image_size = image_size
        self.device = device
        on_gpu = device.type == "cuda"
        self._pipeline = _two_view_graph(
            image_size,
            "mixed" if on_gpu else "cpu",
            batch_size=batch_size,
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            # one batch in, one batch out: depth comes from the stream in front of the trainer
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        self._pipeline.build()

    def load(self, samples: Sequence[FetchedSample]) -> Batch:
        """Two views of every sample.

        Raises:
            InputError: DALI refused a sample that passed its checksum.
        """
        for name, arrays in _inputs(samples).items():
            layout = "HWC" if name.endswith("mask") else None
            self._pipeline.feed_input(name, arrays, layout=layout)
        try:
            outputs = self._pipeline.run()
        except RuntimeError as error:
            names = ", ".join(sample.name for sample in samples[:8])
            raise InputError(
                f"DALI cannot decode a batch of {len(samples)} samples ({names}, …): "
                f"{str(error)[:300]}; build these shards again, or set data.loader=torch"
            ) from None
        images = [self._to_torch(output, torch.float32) for output in outputs[:2]]
        masks = [self._to_torch(output, torch.uint8)[..., 0] for output in outputs[2:]]
        sample_ids = torch.tensor([sample.sample_id for sample in samples]).to(self.device)
        query, key = (image.permute(0, 3, 1, 2) for image in images)
        return Batch(query, key, masks[0], masks[1], sample_ids)

    def close(self) -> None:
        del self._pipeline

    def _to_torch(self, output: Any, dtype: torch.dtype) -> Tensor:
        dense = output.as_tensor()
        tensor = torch.empty(dense.shape(), dtype=dtype, device=self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        feed_ndarray(dense, tensor, cuda_stream=stream)
        return tensor


@dali.pipeline_def  # type: ignore[untyped-decorator]
def _two_view_graph(image_size: int, decoder: str) -> tuple[Any, ...]:
    encoded = fn.external_source(name="image", ndim=1, dtype=types.UINT8)
    image = fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
    images, masks = [], []
    for name in _VIEW_NAMES:
        window = {
            "start": fn.external_source(name=f"{name}_start", ndim=1, dtype=types.INT32),
            "shape": fn.external_source(name=f"{name}_shape", ndim=1, dtype=types.INT32),
            "axes": (0, 1),
        }
        flip = fn.external_source(name=f"{name}_flip", ndim=0, dtype=types.INT32)
        mask = fn.external_source(name=f"{name}_mask", ndim=3, dtype=types.UINT8, layout="HWC")
        if decoder == "mixed":
            mask = mask.gpu()
        side = {"resize_x": image_size, "resize_y": image_size}
        crop = fn.resize(fn.slice(image, **window), **side, interp_type=types.INTERP_LINEAR)
        mask = fn.resize(fn.slice(mask, **window), **side, interp_type=types.INTERP_NN)
        images.append(_normalise(_colour(crop, name), flip))
        masks.append(fn.flip(mask, horizontal=flip))
    return (*images, *masks)


def _colour(crop: Any, name: str) -> Any:
    """`views.colour_matrix` as DALI operators: color_twist, then its contrast moved to the mean."""
    factor = {
        kind: fn.external_source(name=f"{name}_{kind}", ndim=0, dtype=types.FLOAT)
        for kind in ("brightness", "contrast", "saturation", "hue")
    }
    twisted = fn.color_twist(crop, **factor, dtype=types.FLOAT)
    weights = types.Constant(np.array(GREY_WEIGHTS, np.float32), device="cpu")
    mean = fn.reductions.mean(crop, axes=(0, 1), dtype=types.FLOAT)
    grey_mean = fn.reductions.sum(mean * weights, axes=(0,))
    moved = factor["brightness"] * (1.0 - factor["contrast"]) * (grey_mean - _COLOUR_CENTRE)
    return dali.math.clamp(twisted + moved, 0.0, 255.0)


def _normalise(image: Any, flip: Any) -> Any:
    return fn.crop_mirror_normalize(
        image,
        mirror=flip,
        mean=[255 * value for value in IMAGENET_MEAN],
        std=[255 * value for value in IMAGENET_STD],
        dtype=types.FLOAT,
        output_layout="HWC",
    )


def _inputs(samples: Sequence[FetchedSample]) -> dict[str, list[NDArray[Any]]]:
    """The arrays that the graph's inputs take, one a sample."""
    inputs: dict[str, list[NDArray[Any]]] = {"image": [sample.image for sample in samples]}
    for number, name in enumerate(_VIEW_NAMES):
        views: list[View] = [sample.views[number] for sample in samples]
        inputs[f"{name}_mask"] = [sample.view_mask(number)[..., None] for sample in samples]
        inputs[f"{name}_start"] = [view.windows[0, :2] for view in views]
        inputs[f"{name}_shape"] = [view.windows[0, 2:] for view in views]
        inputs[f"{name}_flip"] = [np.array(view.flip, np.int32) for view in views]
        for kind in ("brightness", "contrast", "saturation", "hue"):
            inputs[f"{name}_{kind}"] = [np.array(getattr(view, kind), np.float32) for view in views]
    return inputs
