"""Pictures as a network takes them, prepared as in evaluation; for notebooks."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from data_pipeline.errors import InputError, SampleError
from data_pipeline.pictures import MAX_PIXELS, read_picture, to_rgb
from data_pipeline.resize import Resize, require_resize, resize_image
from data_pipeline.whole_images import normalise

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
Pictures = Picture | Sequence[Picture]
_ACCEPTED = (
    "expected a path, a PIL image, an array uint8 [H, W, 3], a tensor uint8 [3, H, W], or a list "
    "of them"
)


def prepare_images(pictures: Pictures, size: int, resize: Resize = "opencv") -> Tensor:
    """float32 [B, 3, size, size], resized and normalised as in evaluation; see `Encoder.images`.

    Raises:
        InputError: something that is not a picture, naming it; or no pictures at all.
    """
    require_resize(resize)
    if resize == "crop":
        raise InputError("resize is 'crop', which leaves parts out; it can be opencv or antialias")
    if size < 1:
        raise InputError(f"size is {size}; it must be at least 1 pixel")
    several = _several(pictures)
    if not several:
        raise InputError(f"no pictures were given; {_ACCEPTED}")
    squares = [
        resize_image(_pixels(one, f"picture {number}"), size, resize)
        for number, one in enumerate(several)
    ]
    return normalise(torch.stack(squares))


def require_images(images: Tensor) -> None:
    """Raises InputError unless `images` are float [B, 3, H, W], as `Encoder.images` makes them."""
    if not isinstance(images, Tensor):
        found = type(images).__name__
    elif images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    elif min(images.shape) == 0:
        found = f"of shape {list(images.shape)}"
    else:
        return
    raise InputError(
        f"the images are {found}; expected normalised float [B, 3, H, W], which "
        "`encoder.images(pictures)` makes"
    )


def _several(pictures: Pictures) -> list[Picture]:
    if isinstance(pictures, (np.ndarray, Tensor)):
        return list(pictures) if pictures.ndim == 4 else [pictures]
    if isinstance(pictures, (str, os.PathLike, Image.Image)):
        return [pictures]
    if isinstance(pictures, Sequence):
        return list(pictures)
    raise InputError(f"{type(pictures).__name__} is not a picture; {_ACCEPTED}")


def _pixels(picture: Picture, name: str) -> NDArray[np.uint8]:
    """uint8 [H, W, 3], RGB and upright."""
    try:
        if isinstance(picture, (str, os.PathLike)):
            name = str(picture)
            return read_picture(str(Path(picture)))
        if isinstance(picture, Image.Image):
            if picture.width * picture.height > MAX_PIXELS:
                raise SampleError("image", f"has more than {MAX_PIXELS:,} pixels")
            return np.array(to_rgb(ImageOps.exif_transpose(picture)))
    except (SampleError, OSError) as error:
        reason = error.reason if isinstance(error, SampleError) else str(error)
        raise InputError(f"{name} cannot be used: {reason}") from None
    values: object = picture
    if isinstance(picture, Tensor):
        channels_last = picture.permute(1, 2, 0) if picture.dim() == 3 else picture
        values = channels_last.detach().cpu().numpy()
    if not isinstance(values, np.ndarray):
        raise InputError(f"{name} is {type(picture).__name__}; {_ACCEPTED}")
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, 2)
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3 or not values.size:
        hint = " (is a tensor [3, H, W], or an array [H, W, 3]?)" if values.ndim == 3 else ""
        raise InputError(f"{name} is {values.dtype} {list(values.shape)}{hint}; {_ACCEPTED}")
    return np.ascontiguousarray(values)
