"""What one sample of a shard is, and how any image, mask or label is brought into that form.

A sample is `KEY.jpg|png|webp` (upright; every decoder gives the same RGB), `KEY.mask.png`
(8-bit grey: 0 background, 1…254 object mask proposals, 255 ignore), `KEY.label.png` (8-bit class
index, 255 ignore; optional) and `KEY.json`. Bytes are copied untouched where they already are so.
"""

import hashlib
import io
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import SampleError

MASK = "mask.png"
LABEL = "label.png"
INFO = "json"
IMAGE_COMPONENTS = ("jpg", "png", "webp")
IGNORE = 255
MAX_PROPOSAL = 254
MAX_PIXELS = 100_000_000  # beyond it an image is taken for a decompression bomb
MAX_GREY_LEVELS = 64  # more distinct values than that in a mask are a soft map, not proposals

MaskMode = Literal["auto", "binary", "ids", "components"]
MASK_MODES = ("auto", "binary", "ids", "components")
UInt8 = NDArray[np.uint8]

_KEY = re.compile(r"[A-Za-z0-9_/-]{1,90}")
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "MPO")
_MASK_FORMATS = ("PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG")
_COPIED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_EXIF_ORIENTATION = 0x0112
_PNG_BIT_DEPTH = 24  # its place in a PNG file
_TURNS = {  # EXIF orientation -> what brings stored pixels upright; 1 and unknown numbers: nothing
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class RawSample:
    """Bytes as a source holds them; `None` where it has no such component.

    A source that makes masks or labels itself, as from polygons, gives them as arrays of the size
    of the stored image: proposal ids uint8 [H, W], class indices uint8 [H, W].
    """

    image: bytes
    mask: bytes | UInt8 | None
    label: bytes | UInt8 | None


@dataclass(frozen=True)
class _Grey:
    """Values [H, W] of a one-channel file, the most its type holds, whether a codec bent them."""

    values: NDArray[np.integer[Any]]
    top: int
    lossy: bool


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
    return ("/".join(parts)[-81:].lstrip("/") or "sample") + "-" + digest


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
    image, orientation = _open(raw.image, "image", _IMAGE_FORMATS)
    component, image_bytes, (width, height) = _pack_image(image, raw.image, orientation)
    components = {component: image_bytes}
    info: dict[str, Any] = {"key": key, "source": source, "height": height, "width": width}
    proposals = 0
    if raw.mask is not None:
        mask = decode_mask(raw.mask, mask_mode)
        mask = _match_size(mask, "mask", (width, height), orientation)
        present = np.unique(mask)
        proposals = int(((present > 0) & (present <= MAX_PROPOSAL)).sum())
        objects = (mask > 0) & (mask <= MAX_PROPOSAL)
        info["proposals"] = proposals
        info["object_share"] = round(float(objects.mean()), 6)
        components[MASK] = encode_png(mask)
    if raw.label is not None:
        label = _match_size(_decode_label(raw.label), "label", (width, height), orientation)
        _check_classes(label, num_classes)
        components[LABEL] = encode_png(label)
    components[INFO] = json.dumps(info, sort_keys=True, separators=(",", ":")).encode()
    return PackedSample(key, components, height, width, proposals)


def open_image(data: bytes, stage: str, formats: tuple[str, ...] = _IMAGE_FORMATS) -> Image.Image:
    """Decodes an image completely, refusing other formats and absurd sizes before decoding."""
    return _open(data, stage, formats)[0]


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
    1, and takes {0, 1} as it is. `ids` takes the values as they are. A palette PNG gives its
    indices, not its colours. A file with an orientation of its own comes out upright.
    """
    grey = _grey_values(data, "mask")
    values = grey.values
    present = set(np.unique(values).tolist())
    if mode == "binary" and present <= {0, 1}:
        return values.astype(np.uint8)
    if mode == "binary":
        return (values >= (grey.top + 1) // 2).astype(np.uint8)
    if mode == "auto" and (present <= {0, grey.top} or present <= {0, 255}):
        return (values > 0).astype(np.uint8)
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


def encode_png(values: UInt8) -> bytes:
    """8-bit grey PNG of uint8 [H, W]; the same bytes for the same values."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _open(data: bytes, stage: str, formats: tuple[str, ...]) -> tuple[Image.Image, int]:
    """The decoded image and its EXIF orientation; Pillow itself brings a TIFF upright."""
    if not data:
        raise SampleError(stage, "the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise SampleError(
                stage, f"{width}×{height} pixels are more than the limit of {MAX_PIXELS:,}"
            )
        frames = int(getattr(image, "n_frames", 1))
        if frames > 1 and image.format != "MPO":  # a camera's MPO: the picture, then its previews
            raise SampleError(
                stage, f"is an animation or has pages, {frames} of them; expected one picture"
            )
        orientation = image.getexif().get(_EXIF_ORIENTATION)  # asked before a TIFF is turned
        image.load()
    except SampleError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, …
        raise SampleError(stage, f"cannot be decoded ({str(error)[:200]})") from None
    return image, orientation if orientation in _TURNS else 1


def _pack_image(
    image: Image.Image, data: bytes, orientation: int
) -> tuple[str, bytes, tuple[int, int]]:
    """Component name, bytes and upright (width, height); re-encoded only where it has to be."""
    deep = image.format == "PNG" and data[_PNG_BIT_DEPTH] != 8  # decoders differ in rounding it
    plain = image.mode in ("RGB", "L") and orientation == 1 and not deep
    if image.format in _COPIED and plain:
        return _COPIED[image.format], data, image.size
    upright = _to_rgb(image)
    if image.format != "TIFF":
        upright = _turn(upright, orientation)
    buffer = io.BytesIO()
    if image.format in ("JPEG", "MPO"):
        upright.save(buffer, "JPEG", quality=95, subsampling=0)
        return "jpg", buffer.getvalue(), upright.size
    upright.save(buffer, "PNG", compress_level=6)
    return "png", buffer.getvalue(), upright.size


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB without a trace of the file's metadata (profile, transparent colour, rotation)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        high_byte = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)  # Pillow would clip
        return Image.fromarray(high_byte).convert("RGB")
    if image.mode in ("I", "F"):
        raise SampleError("image", "has 32-bit values of unknown range; save it with 8 or 16 bits")
    return Image.fromarray(np.asarray(image.convert("RGB")))


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _match_size(values: UInt8, stage: str, upright: tuple[int, int], orientation: int) -> UInt8:
    """A mask drawn on the stored, not yet upright, pixels is turned as its image was.

    Where both have one size (square images, turns by 180°, mirrored ones) nothing tells them
    apart, and the mask is taken to be upright.
    """
    size = (values.shape[1], values.shape[0])
    if size == upright:
        return values
    if orientation >= 5 and size == upright[::-1]:
        return np.asarray(_turn(Image.fromarray(values), orientation))
    raise SampleError(stage, f"is {size[0]}×{size[1]} pixels, its image {upright[0]}×{upright[1]}")


def _grey_values(data: bytes, stage: str) -> _Grey:
    image, orientation = _open(data, stage, _MASK_FORMATS)
    values = _one_channel(image, stage)
    top = 1 if image.mode == "1" else 255
    if image.mode.startswith("I") and values.max() > 255:
        top = 65535
    if image.format != "TIFF" and orientation != 1:
        values = np.asarray(_turn(Image.fromarray(values), orientation))
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


def _decode_label(data: bytes) -> UInt8:
    grey = _grey_values(data, "label")
    if grey.lossy:
        raise SampleError(
            "label", "is a lossy JPEG or WebP, which changes class indices; save it as PNG"
        )
    return _to_uint8(grey.values, "label")


def _to_uint8(values: NDArray[np.integer[Any]], stage: str) -> UInt8:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise SampleError(
            stage, f"has values {low}…{high}; they must fit in 8 bits: 0…254, and 255 is ignore"
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
