"""What one sample of a shard is, and how any image, mask or label is brought into that form.

A sample is `KEY.jpg|png|webp` (upright; every decoder gives the same RGB), `KEY.mask.png`
(8-bit grey: 0 background, 1…254 object mask proposals, 255 ignore), `KEY.label.png` (8-bit class
index, 255 ignore; optional) and `KEY.json`. Bytes are copied untouched where they already are so.
"""

import hashlib
import io
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data_pipeline.errors import SampleError

MASK = "mask.png"
LABEL = "label.png"
INFO = "json"
IMAGE_COMPONENTS = ("jpg", "png", "webp")
IGNORE = 255
MAX_PROPOSAL = 254
MAX_PIXELS = 100_000_000  # beyond it an image is taken for a decompression bomb
MAX_GREY_LEVELS = 64  # more distinct values than that in a mask are a soft map, not proposals

MaskMode = Literal["auto", "binary", "ids"]
UInt8 = NDArray[np.uint8]

_KEY = re.compile(r"[A-Za-z0-9_/-]{1,90}")
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "MPO")
_MASK_FORMATS = ("PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG")
_COPIED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class RawSample:
    """Bytes as a source holds them; `None` where it has no such component."""

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


def safe_key(name: str) -> str:
    """`name` as a sample key: `[A-Za-z0-9_/-]{1,90}`, no empty or dotted path part.

    A name that has to be changed gets eight hex digits of its SHA-1, so that two names never meet.
    """
    if _KEY.fullmatch(name) and all(name.split("/")):
        return name
    parts = [re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in name.split("/") if part.strip(".")]
    digest = hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return "/".join(parts)[-81:].lstrip("/") + "-" + digest


def pack_sample(
    key: str, source: str, raw: RawSample, mask_mode: MaskMode, num_classes: int | None = None
) -> PackedSample:
    """Decodes and checks every component once and returns what goes into the shard.

    Args:
        key: the sample's key, already safe.
        source: where it came from, kept in `KEY.json`.
        raw: its bytes.
        mask_mode: how mask values are read, see `decode_mask`.
        num_classes: labels above it are refused; `None` does not check.

    Raises:
        SampleError: a component cannot be used; says which and why.
    """
    image = open_image(raw.image, "image", _IMAGE_FORMATS)
    stored_size = image.size
    orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
    component, image_bytes, upright = _pack_image(image, raw.image, orientation)
    width, height = upright.size
    components = {component: image_bytes}
    info: dict[str, Any] = {"key": key, "source": source, "height": height, "width": width}
    proposals = 0
    if raw.mask is not None:
        mask = decode_mask(raw.mask, mask_mode)
        mask = _match_size(mask, "mask", upright.size, stored_size, orientation)
        present = np.unique(mask)
        proposals = int(((present > 0) & (present <= MAX_PROPOSAL)).sum())
        objects = (mask > 0) & (mask <= MAX_PROPOSAL)
        info["proposals"] = proposals
        info["object_share"] = round(float(objects.mean()), 6)
        components[MASK] = encode_png(mask)
    if raw.label is not None:
        label = _decode_indices(raw.label, "label")
        label = _match_size(label, "label", upright.size, stored_size, orientation)
        _check_classes(label, num_classes)
        components[LABEL] = encode_png(label)
    components[INFO] = json.dumps(info, sort_keys=True, separators=(",", ":")).encode()
    return PackedSample(key, components, height, width, proposals)


def open_image(data: bytes, stage: str, formats: tuple[str, ...] = _IMAGE_FORMATS) -> Image.Image:
    """Decodes an image completely, refusing other formats and absurd sizes before decoding."""
    if not data:
        raise SampleError(stage, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=formats)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise SampleError(
                    stage, f"{width}×{height} pixels are more than the limit of {MAX_PIXELS:,}"
                )
            image.load()
    except SampleError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, …
        raise SampleError(stage, f"cannot be decoded ({str(error)[:200]})") from None
    return image


def decode_rgb(data: bytes) -> UInt8:
    """Decodes the image component of a shard to uint8 [H, W, 3]."""
    return np.asarray(open_image(data, "image").convert("RGB"))


def decode_grey(data: bytes, stage: str) -> UInt8:
    """Decodes a mask or label component of a shard to uint8 [H, W]."""
    image = open_image(data, stage, ("PNG",))
    if image.mode != "L":
        raise SampleError(stage, f"is {image.mode}, not 8-bit grey as shards hold it")
    return np.asarray(image)


def decode_mask(data: bytes, mode: MaskMode) -> UInt8:
    """Decodes any mask file to proposal ids, uint8 [H, W].

    `auto` takes {0, 255}, {0, 1} and {0, 65535} as one object and anything else as ids, where 255
    is ignore; a soft map is refused. `binary` calls every value of at least half the range object
    1. `ids` takes the values as they are. A palette file gives its indices, not its colours.
    """
    values, top = _grey_values(data, "mask")
    present = np.unique(values)
    if mode == "binary":
        return (values >= (top + 1) // 2).astype(np.uint8)
    if mode == "auto" and (set(present.tolist()) <= {0, top} or set(present.tolist()) <= {0, 255}):
        return (values > 0).astype(np.uint8)
    if mode == "auto" and len(present) > MAX_GREY_LEVELS:
        raise SampleError(
            "mask",
            f"has {len(present)} grey levels, so it looks like a soft saliency map; "
            "--mask-mode binary takes it at one half, --mask-mode ids as object ids",
        )
    return _to_uint8(values, "mask")


def encode_png(values: UInt8) -> bytes:
    """8-bit grey PNG of uint8 [H, W]; the same bytes for the same values."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _pack_image(
    image: Image.Image, data: bytes, orientation: int
) -> tuple[str, bytes, Image.Image]:
    """Component name, bytes and the upright image; re-encoded only where it has to be."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise SampleError("image", f"is an animation of {getattr(image, 'n_frames', 1)} frames")
    if image.format in _COPIED and image.mode in ("RGB", "L") and orientation == 1:
        return _COPIED[image.format], data, image
    upright = (ImageOps.exif_transpose(image) or image).convert("RGB")
    buffer = io.BytesIO()
    if image.format in ("JPEG", "MPO"):
        upright.save(buffer, "JPEG", quality=95, subsampling=0)
        return "jpg", buffer.getvalue(), upright
    upright.save(buffer, "PNG", compress_level=6)
    return "png", buffer.getvalue(), upright


def _match_size(
    values: UInt8,
    stage: str,
    upright: tuple[int, int],
    stored: tuple[int, int],
    orientation: int,
) -> UInt8:
    """A mask drawn on the stored, not yet upright, pixels is turned as its image was.

    Where both have one size (square images, turns by 180°) the mask is taken to be upright.
    """
    size = (values.shape[1], values.shape[0])
    if size == upright:
        return values
    if size == stored:
        turned = Image.fromarray(values)
        turned.getexif()[_EXIF_ORIENTATION] = orientation
        return np.asarray(ImageOps.exif_transpose(turned) or turned)
    raise SampleError(
        stage, f"is {size[0]}×{size[1]} pixels, its image {upright[0]}×{upright[1]}"
    )


def _grey_values(data: bytes, stage: str) -> tuple[NDArray[np.integer[Any]], int]:
    """Values [H, W] of a one-channel image, and the largest its type holds."""
    image = open_image(data, stage, _MASK_FORMATS)
    if image.format == "JPEG" and stage == "label":
        raise SampleError(stage, "is a JPEG, which changes class indices; save it as PNG")
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8), 1
    if image.mode in ("L", "P"):
        return np.asarray(image), 255
    if image.mode == "LA":
        return np.asarray(image)[..., 0], 255
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.int64), 65535
    if image.mode in ("RGB", "RGBA"):
        channels = np.asarray(image)[..., :3]
        if (channels == channels[..., :1]).all():
            return channels[..., 0], 255
        raise SampleError(stage, "has colours; expected one grey or palette channel of ids")
    raise SampleError(stage, f"has the unknown pixel format {image.mode}")


def _decode_indices(data: bytes, stage: str) -> UInt8:
    values, _ = _grey_values(data, stage)
    return _to_uint8(values, stage)


def _to_uint8(values: NDArray[np.integer[Any]], stage: str) -> UInt8:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise SampleError(
            stage, f"is 16-bit with values {low}…{high}; ids must fit in 0…254, and 255 is ignore"
        )
    return np.ascontiguousarray(values, dtype=np.uint8)


def _check_classes(label: UInt8, num_classes: int | None) -> None:
    if num_classes is None:
        return
    wrong = np.unique(label[(label >= num_classes) & (label != IGNORE)])
    if len(wrong):
        raise SampleError(
            "label", f"has class {int(wrong[0])}, but there are only classes 0…{num_classes - 1}"
        )
