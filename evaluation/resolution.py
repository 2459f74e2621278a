"""At which pixels a map of an image's square is scored."""

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.resize import resize_nearest
from data_pipeline.sample import Label

Resolution = Literal["label", "image"]


def require_resolution(name: str) -> None:
    """Raises InputError unless `name` is label or image."""
    if name not in ("label", "image"):
        raise InputError(f"--resolution is {name!r}; it can be label or image")


def at_resolution(
    label: Label, prediction: Tensor, resolution: Resolution
) -> tuple[Label, NDArray[np.integer[Any]]]:
    """Label [H, W] and prediction [S, S], both at the label's own size or both at the square's."""
    if resolution == "image":
        size = (prediction.shape[0], prediction.shape[1])
        return resize_nearest(torch.tensor(label), size).numpy(), prediction.numpy()
    return label, resize_nearest(prediction, (label.shape[0], label.shape[1])).numpy()
