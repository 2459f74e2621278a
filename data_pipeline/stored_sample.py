"""Decodes components that already lie in a shard, and says what is not in the form of sample.py."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import SampleError
from data_pipeline.sample import (
    IGNORE,
    INFO,
    LABEL,
    MASK,
    MAX_PROPOSAL,
    UInt8,
    decode_grey,
    open_image,
)

Values = NDArray[np.unsignedinteger[Any]]

_COMPONENTS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # by Pillow's name of the format
_EXIF_ORIENTATION = 0x0112
_PNG_DEPTH = slice(24, 26)  # bit depth and colour type


@dataclass(frozen=True)
class DecodedSample:
    """What the components of one sample decode to.

    Attributes:
        image: component name that the image's format has.
        height, width: of the image, pixels.
        proposals: object mask proposals in the mask.
    """

    image: str
    height: int
    width: int
    proposals: int


def decode_label(data: bytes) -> tuple[Values, int]:
    """Class indices uint8 or uint16 [H, W] of a label component, and the index that is ignored."""
    image = open_image(data, "label", ("PNG",))
    if image.mode == "L":
        return np.asarray(image), IGNORE
    if image.mode.startswith("I;16") or (image.mode == "I" and data[_PNG_DEPTH] == b"\x10\0"):
        return np.asarray(image).astype(np.uint16), np.iinfo(np.uint16).max
    raise SampleError("label", f"is {image.mode}, not 8- or 16-bit grey as shards hold it")


def count_proposals(mask: UInt8) -> int:
    """Object mask proposals in ids [H, W]."""
    return int(np.count_nonzero(np.bincount(mask.ravel(), minlength=256)[1 : MAX_PROPOSAL + 1]))


def check_stored(
    components: dict[str, bytes], num_classes: int | None = None, refuse_binary: bool = False
) -> DecodedSample:
    """Decodes every component once.

    Args:
        components: slot -> bytes; the image is the one that is no mask, label or info.
        num_classes: labels above it are refused; `None` does not check.
        refuse_binary: refuses masks of 0 and 255 alone, which mean one object to most programs,
            but nothing except ignored pixels here.

    Raises:
        SampleError: a component is damaged or not in the form of sample.py; the stage is its name.
    """
    data = next(data for slot, data in components.items() if slot not in (MASK, LABEL, INFO))
    image = _check_image(data)
    size = image.size[::-1]
    proposals = 0
    if MASK in components:
        mask = decode_grey(components[MASK], "mask")
        _check_plain_png(components[MASK], "mask", (b"\x08\0",))
        _check_size(mask, size, "mask")
        if refuse_binary and set(np.unique(mask).tolist()) <= {0, IGNORE} and mask.any():
            raise SampleError("mask", "has 0 and 255 only, and 255 is read as ignore")
        proposals = count_proposals(mask)
    if LABEL in components:
        label, ignore = decode_label(components[LABEL])
        _check_plain_png(components[LABEL], "label", (b"\x08\0", b"\x10\0"))
        _check_size(label, size, "label")
        top = int(label[label != ignore].max(initial=0))
        if num_classes is not None and top >= num_classes:
            raise SampleError(
                "label", f"has class {top}, but there are only classes 0…{num_classes - 1}"
            )
    if INFO in components:
        parse_info(components[INFO])
    return DecodedSample(_COMPONENTS[str(image.format)], *size, proposals)


def parse_info(data: bytes) -> dict[str, Any]:
    """The JSON object of `KEY.json`; SampleError where it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("info", f"is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise SampleError("info", "is no JSON object")
    return value


def _check_image(data: bytes) -> Image.Image:
    image = open_image(data, "image")
    if image.format not in _COMPONENTS:
        raise SampleError("image", f"is {image.format}; shards hold JPEG, PNG or WebP")
    if image.mode not in ("RGB", "L"):
        raise SampleError("image", f"has the pixel format {image.mode}; shards hold RGB or grey")
    if image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9):
        raise SampleError("image", "is not upright, it has to be turned as its EXIF data says")
    if image.format == "PNG" and data[_PNG_DEPTH][:1] != b"\x08":
        raise SampleError("image", f"has {data[_PNG_DEPTH][0]} bits a channel; shards hold 8")
    return image


def _check_plain_png(data: bytes, stage: str, kinds: tuple[bytes, ...]) -> None:
    if data[_PNG_DEPTH] not in kinds:
        raise SampleError(stage, "is not 8-bit grey as shards hold it")


def _check_size(values: Values, size: tuple[int, int], stage: str) -> None:
    if values.shape != size:
        height, width = values.shape
        raise SampleError(stage, f"is {width}×{height} pixels, its image {size[1]}×{size[0]}")
