"""Masks and labels of any origin: to proposal ids and class indices."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import SampleError
from data_pipeline.pictures import open_checked, png_chunks, turn

IGNORE = 255
MAX_PROPOSAL = 254
MAX_GREY_LEVELS = 64  # more distinct values than that in a mask are a soft map, not proposals

MaskMode = Literal["auto", "binary", "ids", "components"]
MASK_MODES = ("auto", "binary", "ids", "components")
UInt8 = NDArray[np.uint8]

_MASK_FORMATS = ("PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG")
_PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"tEXt"}  # they change no value
_PNG_BIT_DEPTH, _PNG_INTERLACE = 24, 28  # their places in a PNG file


@dataclass(frozen=True)
class _Grey:
    """Values [H, W] of a one-channel file, the most its type holds, whether a codec bent them."""

    values: NDArray[np.integer[Any]]
    top: int
    lossy: bool


def decode_mask(data: bytes, mode: MaskMode, min_area: float = 0.01) -> UInt8:
    """Decodes any mask file to proposal ids, uint8 [H, W].

    `auto` takes {0, 255}, {0, 1} and {0, 65535} as one object and anything else as ids, where 255
    is ignore; a soft map is refused. `binary` calls every value of at least half the range object
    1, and takes {0, 1} as it is. `ids` takes the values as they are. `components` makes a proposal
    of every connected part of what `binary` calls the object, if it covers `min_area` of the image.
    A palette PNG gives its indices, not its colours. A file with an orientation of its own comes
    out upright.
    """
    return _interpret(_grey_values(data, "mask"), mode, min_area)


def read_mask(data: bytes, mode: MaskMode, min_area: float = 0.01) -> tuple[UInt8, bool]:
    """`decode_mask`, and whether the file's bytes already say just that, as shards hold it."""
    grey = _grey_values(data, "mask")
    values = _interpret(grey, mode, min_area)
    return values, values is grey.values and is_plain(data)


def read_label(data: bytes) -> tuple[UInt8, bool]:
    """Class indices uint8 [H, W], and whether the file's bytes already are as shards hold them."""
    grey = _grey_values(data, "label")
    if grey.lossy:
        raise SampleError(
            "label", "is a lossy JPEG or WebP, which changes class indices; save it as PNG"
        )
    values = _to_uint8(grey.values, "label")
    return values, values is grey.values and is_plain(data)


def is_plain(data: bytes) -> bool:
    """Whether a PNG is 8-bit grey without anything that might change what decoders make of it."""
    return (
        data[1:4] == b"PNG"
        and data[_PNG_BIT_DEPTH : _PNG_BIT_DEPTH + 2] == b"\x08\x00"  # depth 8, grey
        and data[_PNG_INTERLACE] == 0
        and _PLAIN_CHUNKS.issuperset(png_chunks(data))
    )


def present_values(values: NDArray[np.integer[Any]]) -> list[int]:
    """The distinct values, ascending."""
    if values.dtype == np.uint8:  # counting is three times as fast as sorting
        found = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    else:
        found = np.unique(values)
    return [int(value) for value in found]


def connected_components(objects: NDArray[np.bool_], min_area: float) -> UInt8:
    """Proposal ids 1… of the 8-connected parts of bool [H, W] that cover `min_area` of it.

    In the order of their first pixels; of more than 254 the largest are kept.
    """
    from scipy import ndimage  # takes a third of a second, and few masks need it

    parts, count = ndimage.label(objects, structure=np.ones((3, 3), bool))
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    # a part of just the smallest share stays, however its product rounds
    large = np.flatnonzero(areas >= max(1.0, min_area * objects.size * (1 - 1e-12)))
    if len(large) > MAX_PROPOSAL:
        by_area = np.argsort(-areas[large], kind="stable")[:MAX_PROPOSAL]
        large = np.sort(large[by_area])
    ids = np.zeros(count + 1, np.uint8)
    ids[large + 1] = np.arange(1, len(large) + 1)
    numbered: UInt8 = ids[parts]
    return numbered


def _interpret(grey: _Grey, mode: MaskMode, min_area: float) -> UInt8:
    values = grey.values
    present = set(present_values(values))
    if mode in ("binary", "components"):
        bound = 1 if present <= {0, 1} else (grey.top + 1) // 2
        objects = values >= bound
        if mode == "components":
            return connected_components(objects, min_area)
        return objects.view(np.uint8)
    if mode == "auto" and present <= {0, 1} and values.dtype == np.uint8:
        return _to_uint8(values, "mask")
    if mode == "auto" and (present <= {0, grey.top} or present <= {0, 255}):
        return (values > 0).view(np.uint8)
    if mode == "auto" and len(present) > MAX_GREY_LEVELS:
        raise SampleError(
            "mask",
            f"has {len(present)} grey levels, so it looks like a soft saliency map; "
            "--mask-mode binary takes it at one half, --mask-mode ids as object ids",
        )
    if grey.lossy:
        raise SampleError(
            "mask",
            "is a lossy JPEG or WebP, which changes ids; "
            "save it as PNG, or take it at one half with --mask-mode binary",
        )
    return _to_uint8(values, "mask")


def _grey_values(data: bytes, stage: str) -> _Grey:
    image, orientation = open_checked(data, stage, _MASK_FORMATS)
    values = _one_channel(image, stage)
    top = 1 if image.mode == "1" else 255
    if image.mode.startswith("I") and values.max() > 255:
        top = 65535
    if image.format != "TIFF" and orientation != 1:
        values = np.asarray(turn(Image.fromarray(values), orientation))
    # "VP8 " is the lossy kind of WebP; the lossless one starts with "VP8L"
    return _Grey(values, top, image.format == "JPEG" or data[8:16] == b"WEBPVP8 ")


def _one_channel(image: Image.Image, stage: str) -> NDArray[np.integer[Any]]:
    """Values [H, W] of an image that has one channel, or several that say the same."""
    if image.mode in ("LA", "RGBA", "PA"):
        alpha = np.asarray(image)[..., -1]
        if (alpha != alpha[0, 0]).any():
            raise SampleError(
                stage, "has see-through parts, so its values are not clear; save it without alpha"
            )
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    if image.mode == "P" and image.format == "GIF":
        # GIF has no grey kind: writers put grey levels into the palette, in any order
        colours = np.asarray(image.convert("RGB"))
        if (colours == colours[..., :1]).all():
            return colours[..., 0]
    if image.mode in ("L", "P"):
        return np.asarray(image)
    if image.mode in ("LA", "PA"):
        return np.asarray(image)[..., 0]
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.int32)
    if image.mode in ("RGB", "RGBA"):
        channels = np.asarray(image)[..., :3]
        if (channels == channels[..., :1]).all():
            return channels[..., 0]
        raise SampleError(stage, "has colours; expected one grey or palette channel of ids")
    raise SampleError(stage, f"has the pixel format {image.mode}; expected one grey channel")


def _to_uint8(values: NDArray[np.integer[Any]], stage: str) -> UInt8:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise SampleError(
            stage, f"has values {low}…{high}; they must fit in 8 bits: 0…254, and 255 is ignore"
        )
    return np.ascontiguousarray(values, dtype=np.uint8)
