"""What one sample of a shard is, and how any image, mask or label is brought into that form.

A sample is `KEY.jpg|png|webp` (upright; every decoder gives the same RGB), `KEY.mask.png`
(8-bit grey: 0 background, 1…254 object mask proposals, 255 ignore), `KEY.label.png` (class index
in 8-bit grey, 255 ignore, or, for more than 254 classes, 16-bit grey, 65535 ignore; optional) and
`KEY.json`. Bytes are copied untouched where they already are so.
"""

import hashlib
import io
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import SampleError
from data_pipeline.mask_files import (
    IGNORE,
    MASK_MODES,
    MAX_GREY_LEVELS,
    MAX_PROPOSAL,
    MaskMode,
    decode_mask,
    present_values,
    read_label,
    read_mask,
)
from data_pipeline.pictures import (
    MAX_PIXELS,
    decode_plain_jpeg,
    decode_plain_png,
    encode_png,
    open_checked,
    open_image,
    to_rgb,
    turn,
)

__all__ = [
    "IGNORE",
    "MASK_MODES",
    "MAX_GREY_LEVELS",
    "MAX_PIXELS",
    "MAX_PROPOSAL",
    "MaskMode",
    "decode_mask",
    "encode_png",
    "open_image",
]

MASK = "mask.png"
LABEL = "label.png"
INFO = "json"
IMAGE_COMPONENTS = ("jpg", "png", "webp")

UInt8 = NDArray[np.uint8]
Values = NDArray[np.unsignedinteger[Any]]
Label = NDArray[np.int16]  # class index [H, W] as evaluation reads it, IGNORED where it is ignored
IGNORED = -1  # in a `Label`, whatever its file says it with

IGNORE_16_BIT = 65535  # in labels of more than 254 classes

_KEY = re.compile(r"[A-Za-z0-9_/-]{1,90}")
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
_COPIED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_PNG_BIT_DEPTH = 24  # its place in a PNG file


@dataclass(frozen=True)
class Policy:
    """How samples are brought into form.

    Attributes:
        mask_mode, min_area: see `mask_files.decode_mask`.
        max_side: larger images are made smaller, to this many pixels; 0: none is.
        quality: of JPEGs that have to be encoded again.
        lenient: takes JPEGs that a decoder warns about.
    """

    mask_mode: MaskMode = "auto"
    min_area: float = 0.01
    max_side: int = 0
    quality: int = 95
    lenient: bool = False


@dataclass(frozen=True)
class RawSample:
    """Bytes as a source holds them; `None` where it has no such component.

    A source that makes masks or labels itself, as from polygons, gives them as arrays of the size
    of the stored image: proposal ids uint8 [H, W], class indices uint8 or uint16 [H, W].
    """

    image: bytes
    mask: bytes | UInt8 | None
    label: bytes | Values | None


@dataclass(frozen=True)
class StoredSample:
    """Components as a shard holds them, still encoded; `None` where it has no such component."""

    image: bytes
    mask: bytes | None
    label: bytes | None


@dataclass(frozen=True)
class PackedSample:
    """One sample ready to be written: component name -> bytes, and what the index keeps of it."""

    key: str
    components: dict[str, bytes]
    height: int
    width: int
    proposals: int


@dataclass(frozen=True)
class _Frame:
    """Sizes (width, height) of an image: upright, and in the shard; its EXIF orientation."""

    upright: tuple[int, int]
    packed: tuple[int, int]
    orientation: int


def safe_key(name: str) -> str:
    """`name` as a sample key: `[A-Za-z0-9_/-]{1,90}`, no empty or dotted path part.

    A name that has to be changed gets eight hex digits of its SHA-1, so that two names never meet.
    """
    if _KEY.fullmatch(name) and all(name.split("/")):
        return name
    parts = [re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in name.split("/") if part.strip(".")]
    digest = hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return ("/".join(parts)[-81:].lstrip("/") or "sample") + "-" + digest


def pack_sample(
    key: str, source: str, raw: RawSample, policy: Policy, num_classes: int | None = None
) -> PackedSample:
    """Decodes and checks every component once and returns what goes into the shard.

    Args:
        key: the sample's key, already safe.
        source: where it came from, kept in `KEY.json`.
        raw: its bytes.
        policy: how they are brought into form.
        num_classes: labels above it are refused; `None` does not check.

    Raises:
        SampleError: a component cannot be used; says which and why.
    """
    component, image_bytes, frame = _pack_image(raw.image, policy)
    width, height = frame.packed
    components = {component: image_bytes}
    info: dict[str, Any] = {"key": key, "source": source, "height": height, "width": width}
    proposals = 0
    if raw.mask is not None:
        mask, plain = _read(raw.mask, policy)
        components[MASK], mask = _pack_values(mask, "mask", frame, raw.mask if plain else None)
        proposals, area = _count_objects(mask)
        info["proposals"] = proposals
        info["object_share"] = round(area / mask.size, 6)
    if raw.label is not None:
        label: Values
        label, plain = read_label(raw.label) if isinstance(raw.label, bytes) else (raw.label, False)
        _check_classes(label, num_classes)
        components[LABEL], _ = _pack_values(label, "label", frame, raw.label if plain else None)
    components[INFO] = _ENCODER.encode(info).encode()
    return PackedSample(key, components, height, width, proposals)


def decode_rgb(data: bytes) -> UInt8:
    """Decodes the image component of a shard to uint8 [H, W, 3], which torch may share."""
    pixels = decode_plain_jpeg(data)
    # np.asarray would be read-only memory, which no tensor can be
    return np.array(open_image(data, "image").convert("RGB")) if pixels is None else pixels


def decode_grey(data: bytes, stage: str) -> UInt8:
    """Decodes a mask or label component of a shard to uint8 [H, W], which torch may share."""
    values = decode_plain_png(data)
    if values is not None:
        return values
    image = open_image(data, stage, ("PNG",))
    if image.mode != "L":
        raise SampleError(stage, f"is {image.mode}, not 8-bit grey as shards hold it")
    return np.array(image)


def decode_label(data: bytes) -> Label:
    """Decodes the label component of a shard: class index int16 [H, W], -1 where it is ignored."""
    image = open_image(data, "label", ("PNG",))
    if image.mode == "L":
        eight_bits = np.asarray(image)
        return np.where(eight_bits == IGNORE, IGNORED, eight_bits.astype(np.int16))
    if not image.mode.startswith("I"):
        raise SampleError("label", f"is {image.mode}, not grey as shards hold it")
    values = np.asarray(image).astype(np.int64)
    wrong = values[(values > np.iinfo(np.int16).max) & (values != IGNORE_16_BIT)]
    if len(wrong):
        raise SampleError("label", f"has class {wrong[0]}, more than there are in any data set")
    return np.where(values == IGNORE_16_BIT, IGNORED, values).astype(np.int16)


def _pack_image(data: bytes, policy: Policy) -> tuple[str, bytes, _Frame]:
    """Component name and bytes of the upright image; encoded again only where it has to be."""
    image, orientation = open_checked(data, "image", lenient=policy.lenient)
    deep = image.format == "PNG" and data[_PNG_BIT_DEPTH] != 8  # decoders differ in rounding it
    plain = image.mode in ("RGB", "L") and orientation == 1 and not deep
    upright = image.size[::-1] if orientation >= 5 and image.format != "TIFF" else image.size
    packed = _limited(upright, policy.max_side)
    frame = _Frame(upright, packed, orientation)
    if image.format in _COPIED and plain and packed == upright:
        return _COPIED[image.format], data, frame
    pixels = to_rgb(image)
    if image.format != "TIFF":
        pixels = turn(pixels, orientation)
    if packed != upright:
        pixels = pixels.resize(packed, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if image.format in ("JPEG", "MPO"):
        pixels.save(buffer, "JPEG", quality=policy.quality, subsampling=0)
        return "jpg", buffer.getvalue(), frame
    pixels.save(buffer, "PNG", compress_level=6)
    return "png", buffer.getvalue(), frame


def _limited(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """`size` brought down to a largest side, at least one pixel each way."""
    largest = max(size)
    if not max_side or largest <= max_side:
        return size
    width, height = (max(1, round(side * max_side / largest)) for side in size)
    return width, height


def _count_objects(mask: UInt8) -> tuple[int, int]:
    """Proposals, and pixels of all of them."""
    if mask.max() <= 1:  # most masks, and much quicker
        area = int(np.count_nonzero(mask))
        return int(area > 0), area
    areas = np.bincount(mask.ravel(), minlength=256)[1 : MAX_PROPOSAL + 1]
    return int(np.count_nonzero(areas)), int(areas.sum())


def _read(mask: bytes | UInt8, policy: Policy) -> tuple[UInt8, bool]:
    if isinstance(mask, bytes):
        return read_mask(mask, policy.mask_mode, policy.min_area)
    return mask, False


def _pack_values(
    values: Any, stage: str, frame: _Frame, data: bytes | Any | None
) -> tuple[bytes, Any]:
    """Bytes and values of a mask or label in the size of its packed image.

    `data` is the file if it may be copied as it is.
    """
    matched = _match_size(values, stage, frame)
    if frame.packed != frame.upright:
        small = Image.fromarray(matched).resize(frame.packed, Image.Resampling.NEAREST)
        matched = np.asarray(small).astype(matched.dtype)
    if data is not None and matched is values:
        return data, matched
    return encode_png(matched), matched


def _match_size(values: Any, stage: str, frame: _Frame) -> Any:
    """A mask drawn on the stored, not yet upright, pixels is turned as its image was.

    Where both have one size (square images, turns by 180°, mirrored ones) nothing tells them
    apart, and the mask is taken to be upright.
    """
    size = (values.shape[1], values.shape[0])
    if size == frame.upright:
        return values
    if frame.orientation >= 5 and size == frame.upright[::-1]:
        return np.asarray(turn(Image.fromarray(values), frame.orientation)).astype(values.dtype)
    width, height = frame.upright
    raise SampleError(stage, f"is {size[0]}×{size[1]} pixels, its image {width}×{height}")


def _check_classes(label: Values, num_classes: int | None) -> None:
    if num_classes is None:
        return
    ignore = np.iinfo(label.dtype).max
    wrong = [value for value in present_values(label) if num_classes <= value != ignore]
    if wrong:
        raise SampleError(
            "label", f"has class {wrong[0]}, but there are only classes 0…{num_classes - 1}"
        )
