"""Opens image files of any origin: safely, completely, and upright."""

import io
import os
import struct
import zlib
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data_pipeline.errors import SampleError

MAX_PIXELS = 100_000_000  # beyond it an image is taken for a decompression bomb
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "MPO")
_EXIF_ORIENTATION = 0x0112
_TURNS = {  # EXIF orientation -> what brings stored pixels upright; 1 and unknown numbers: nothing
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_DATA = 41  # where the data of a second chunk begin, after the signature and an IHDR
_FILTER_UP = 2  # of rows that hold differences to the one above


def open_checked(
    data: bytes, stage: str, formats: tuple[str, ...] = IMAGE_FORMATS, lenient: bool = False
) -> tuple[Image.Image, int]:
    """An image whose bytes decode completely, and its EXIF orientation.

    Pixels are only guaranteed to be in memory after `load`: JPEGs are checked by a decoder that is
    faster and stricter than Pillow's. Pillow itself brings a TIFF upright.

    Args:
        data: of the file.
        stage: of the error.
        formats: Pillow's names of those that are taken.
        lenient: takes JPEGs that a decoder only warns about.

    Raises:
        SampleError: it cannot be decoded, is of absurd size, or an animation.
    """
    if not data:
        raise SampleError(stage, "the file is empty")
    try:
        # Pillow's JPEG opener finds out about MPO itself
        openers = tuple(name for name in formats if name != "MPO")
        image = Image.open(io.BytesIO(data), formats=openers)
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
        # Pillow looks for a PNG's orientation at its end, in chunks of metadata alone
        plain = image.format == "PNG" and _PIXEL_CHUNKS.issuperset(png_chunks(data))
        # asked before a TIFF is turned
        orientation = 1 if plain else image.getexif().get(_EXIF_ORIENTATION)
        if image.format == "JPEG" and not lenient:
            check_jpeg(data)
        if image.format != "JPEG" or image.mode not in ("RGB", "L") or lenient:
            image.load()
    except SampleError:
        raise
    except Image.DecompressionBombError:
        raise SampleError(
            stage, f"says that it has far more than the limit of {MAX_PIXELS:,} pixels"
        ) from None
    except UnidentifiedImageError:  # its text holds an address in memory, another each time
        kinds = ", ".join(formats)
        raise SampleError(stage, f"cannot be decoded (not, or no whole, {kinds})") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, …
        raise SampleError(stage, f"cannot be decoded ({str(error)[:200]})") from None
    return image, orientation if orientation in _TURNS else 1


def open_image(data: bytes, stage: str, formats: tuple[str, ...] = IMAGE_FORMATS) -> Image.Image:
    """Decodes an image completely, refusing other formats and absurd sizes before decoding."""
    image, _ = open_checked(data, stage, formats, lenient=True)
    return image


def decode_plain_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """A JPEG in grey or YCbCr as uint8 [H, W, 3]: Pillow's pixels in two thirds of its time.

    `None` for everything else, also for what is damaged or too large: Pillow then says why.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def decode_plain_png(data: bytes) -> NDArray[np.uint8] | None:
    """A PNG in 8-bit grey as `encode_png` writes them, uint8 [H, W], in half of Pillow's time.

    `None` for everything else, also for what is damaged or too large: Pillow then says why.
    """
    try:
        if data[:8] != _PNG_SIGNATURE or png_chunks(data) != [b"IHDR", b"IDAT", b"IEND"]:
            return None
        length, width, height, *form = struct.unpack_from(">I4xIIBBBBB", data, len(_PNG_SIGNATURE))
        if [length, *form] != [13, 8, 0, 0, 0, 0] or not 0 < width * height <= MAX_PIXELS:
            return None
        size = height * (width + 1)
        decoder = zlib.decompressobj()
        filtered = decoder.decompress(data[_PNG_DATA:-16], size)
        rows = np.frombuffer(filtered, np.uint8).reshape(height, width + 1)
        if not decoder.eof or (rows[:, 0] != _FILTER_UP).any():
            return None
    except (ValueError, struct.error, zlib.error):
        return None
    values: NDArray[np.uint8] = np.add.accumulate(rows[:, 1:], 0, np.uint8)
    return values


def check_jpeg(data: bytes) -> None:
    """Decodes every coefficient of a JPEG, and pixels only at an eighth of its size.

    Damage is in the entropy-coded data: what comes after it, inverse transform and colours, cannot
    fail. Stricter than Pillow, which passes over what libjpeg warns about.

    Raises:
        ValueError: it is cut short or damaged.
    """
    simplejpeg.decode_jpeg(
        data, _jpeg_colours(data), min_height=1, min_width=1, min_factor=8, strict=True
    )


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """Brings stored pixels upright."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB without a trace of the file's metadata (profile, transparent colour, rotation)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        high_byte = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)  # Pillow would clip
        return Image.fromarray(high_byte).convert("RGB")
    if image.mode in ("I", "F"):
        raise SampleError("image", "has 32-bit values of unknown range; save it with 8 or 16 bits")
    return Image.fromarray(np.asarray(image.convert("RGB")))


def read_picture(path: str, lenient: bool = False) -> NDArray[np.uint8]:
    """An image file, upright, as RGB: uint8 [H, W, 3].

    Args:
        path: of the file.
        lenient: takes JPEGs that a decoder only warns about.

    Raises:
        SampleError: it is not an image, is damaged, or is larger than `MAX_PIXELS`.
        OSError: it cannot be read.
    """
    if not os.path.isfile(path):  # a pipe would never end
        raise SampleError(
            "read", "is not a file" if os.path.exists(path) else "there is no such file"
        )
    with open(path, "rb") as file:
        data = file.read()
    image, orientation = open_checked(data, "image", lenient=lenient)
    try:
        pixels = to_rgb(image)
    except SampleError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, …
        raise SampleError("image", f"cannot be decoded ({str(error)[:200]})") from None
    # a copy, as torch may not share read-only memory
    return np.array(pixels if image.format == "TIFF" else turn(pixels, orientation))


def encode_png(values: Any) -> bytes:
    """8- or 16-bit grey PNG of uint8 or uint16 [H, W]; the same bytes for the same values.

    Differences of rows (PNG's filter "up") are long runs in a mask, which run-length coding makes
    as small as deflate's search does in a third of the time; Pillow tries all filters on all rows.
    """
    height, width = values.shape
    depth = 8 * values.dtype.itemsize
    rows = np.ascontiguousarray(values, values.dtype.newbyteorder(">")).view(np.uint8)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = _FILTER_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    encoder = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    compressed = encoder.compress(filtered.data) + encoder.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", compressed), (b"IEND", b""))
    return _PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def png_chunks(data: bytes) -> list[bytes]:
    """Kinds of a PNG's chunks in order, up to its end.

    Raises:
        ValueError: a chunk is cut short or fails its checksum.
    """
    view, offset = memoryview(data), len(_PNG_SIGNATURE)
    kinds: list[bytes] = []
    while not kinds or kinds[-1] != b"IEND":
        size = int.from_bytes(view[offset : offset + 4], "big")
        body = view[offset + 4 : offset + 8 + size]
        checksum = view[offset + 8 + size : offset + 12 + size]
        kind = bytes(body[:4])
        if len(checksum) != 4:
            raise ValueError("the PNG is cut short")
        if zlib.crc32(body) != int.from_bytes(checksum, "big"):
            raise ValueError(f"the PNG's chunk {kind!r} fails its checksum")
        kinds.append(kind)
        offset += 12 + size
    return kinds


def _jpeg_colours(data: bytes) -> str:
    """What libjpeg can decode to without a conversion that it lacks."""
    return "CMYK" if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK") else "GRAY"
