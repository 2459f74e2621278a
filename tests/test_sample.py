"""Every kind of image, mask and label that turns up in the wild has one stated outcome."""

import io
import json
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import SampleError
from data_pipeline.pictures import decode_plain_png
from data_pipeline.sample import (
    MASK,
    MAX_PIXELS,
    MaskMode,
    PackedSample,
    Policy,
    RawSample,
    decode_grey,
    decode_label,
    decode_mask,
    decode_rgb,
    encode_png,
    pack_sample,
)
from tests.sample_data import HEIGHT, WIDTH, encode, object_mask, palette_png, picture

JPEG = encode(picture(), "JPEG", quality=90)
# EXIF orientation -> what a viewer does to the stored pixels (EXIF 2.3, table 6)
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def pack(
    image: bytes,
    mask: bytes | None = None,
    label: bytes | None = None,
    mode: MaskMode = "auto",
    num_classes: int | None = None,
) -> PackedSample:
    return pack_sample("key", "source", RawSample(image, mask, label), Policy(mode), num_classes)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def image_of(sample: PackedSample, name: str) -> np.ndarray:
    return decode_rgb(sample.components[name])


def mask_of(sample: PackedSample) -> np.ndarray:
    return decode_grey(sample.components[MASK], "mask")


def deep_png(values: np.ndarray) -> bytes:
    """16-bit RGB PNG, which Pillow reads but cannot write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- images that cannot be used


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", "cannot be decoded"),
        (bytes(range(256)) * 8, "cannot be decoded"),
        (JPEG[: len(JPEG) // 2], "cannot be decoded"),
        (encode(picture())[:-40], "cannot be decoded"),
        (encode(picture(), "WEBP")[:-40], "cannot be decoded"),
        (b"GIF89a" + bytes(20), "cannot be decoded"),
        (encode(np.zeros((4, 5), np.float32), "TIFF"), "32-bit values of unknown range"),
        (encode(np.full((4, 5), 70000, np.int32), "TIFF"), "32-bit values of unknown range"),
    ],
    ids=["empty", "html", "garbage", "jpeg", "png", "webp", "gif", "float", "int32"],
)
def test_an_unusable_image_is_named_as_such(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason) as caught:
        pack(data, encode(object_mask()))
    assert caught.value.stage == "image"


def test_a_damaged_mask_or_label_is_named_as_such() -> None:
    for stage, raw in (("mask", {"mask": b"GIF89a"}), ("label", {"label": encode(picture())[:60]})):
        with pytest.raises(SampleError, match="cannot be decoded") as caught:
            pack(JPEG, **raw)
        assert caught.value.stage == stage


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "GIF"])
def test_an_animation_or_a_file_of_pages_is_refused(form: str) -> None:
    frames = [Image.fromarray(picture(number)) for number in range(3)]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    if form != "GIF":  # GIF is no image format here, but one of masks
        with pytest.raises(SampleError, match="3 of them"):
            pack(data)
    with pytest.raises(SampleError, match="3 of them"):
        decode_mask(data, "auto")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    # one pixel more than allowed, and no pixel data at all: decoding would fail otherwise
    for width, height in ((MAX_PIXELS + 1, 1), (10_001, 10_000), (60_000, 60_000)):
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        body = b"IHDR" + header
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body
        data += struct.pack(">I", zlib.crc32(body)) + struct.pack(">I", 4) + b"IDATxxxx" + bytes(4)
        with pytest.raises(SampleError, match=r"limit of 100,000,000|exceeds limit"):
            pack(data)


def test_broken_exif_does_not_stop_an_image() -> None:
    data = encode(picture(), "JPEG", exif=b"Exif\0\0MM garbage, not a TIFF header")
    sample = pack(data)
    assert sample.components["jpg"] == data


# ---------------------------------------------------------------- images that are taken


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (JPEG, "jpg"),
        (encode(picture(), "JPEG", progressive=True), "jpg"),
        (encode(picture(), "JPEG", mode="L"), "jpg"),
        (encode(picture()), "png"),
        (encode(picture(), mode="L"), "png"),
        (encode(picture(), "WEBP", quality=80), "webp"),
        (encode(picture(), "JPEG", exif=exif(1)), "jpg"),
        (encode(picture(), "JPEG", exif=exif(0)), "jpg"),
        (encode(picture(), "JPEG", exif=exif(9)), "jpg"),
    ],
    ids=["jpeg", "progressive", "grey-jpeg", "png", "grey-png", "webp", "exif1", "exif0", "exif9"],
)
def test_bytes_are_copied_where_nothing_has_to_change(data: bytes, name: str) -> None:
    sample = pack(data)
    assert sample.components[name] == data
    assert (sample.height, sample.width) == (HEIGHT, WIDTH)
    assert set(sample.components) == {name, "json"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(picture(), "BMP"), picture()),
        (encode(picture(), "TIFF"), picture()),
        (encode(Image.fromarray(picture()).convert("RGBA")), picture()),
        (
            encode(np.where(picture()[..., :1] > 99, 255, 0).astype(np.uint8)[..., 0], mode="1"),
            None,
        ),
        (palette_png(object_mask()), None),
        (encode(picture().astype(np.uint16)[..., 0] * 257), np.repeat(picture()[..., :1], 3, -1)),
        (deep_png(picture().astype(np.uint16) * 257), picture()),
        (encode(picture()[..., 0].astype(np.uint16) * 256, "TIFF"), picture()[..., [0, 0, 0]]),
    ],
    ids=["bmp", "tiff", "rgba", "1-bit", "palette", "16-bit", "16-bit-rgb", "16-bit-tiff"],
)
def test_other_images_become_rgb_png_without_loss(data: bytes, expected: np.ndarray | None) -> None:
    sample = pack(data)
    packed = Image.open(io.BytesIO(sample.components["png"]))
    assert packed.mode == "RGB"
    assert sample.components["png"] != data
    assert sample.components["png"][24] == 8  # bits a channel
    assert packed.getexif().get(0x0112) is None
    expected = (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) if expected is None else expected
    )
    np.testing.assert_array_equal(image_of(sample, "png"), expected)


def test_transparency_leaves_the_colours_and_no_trace_in_the_file() -> None:
    image = Image.fromarray(object_mask()).convert("P")
    data = encode(image, transparency=1)
    sample = pack(data)
    assert "transparency" not in Image.open(io.BytesIO(sample.components["png"])).info
    rgba = np.dstack([picture(), object_mask() * 100])
    np.testing.assert_array_equal(image_of(pack(encode(rgba)), "png"), picture())


def test_cmyk_and_mpo_become_rgb_jpeg() -> None:
    cmyk = encode(picture(), "JPEG", mode="CMYK", quality=95)
    second = [Image.fromarray(picture(3))]
    mpo = encode(picture(), "MPO", save_all=True, append_images=second, quality=95)
    assert Image.open(io.BytesIO(mpo)).format == "MPO"
    for data in (cmyk, mpo):
        sample = pack(data)
        packed = Image.open(io.BytesIO(sample.components["jpg"]))
        assert (packed.format, packed.mode) == ("JPEG", "RGB")
        difference = np.abs(image_of(sample, "jpg").astype(int) - picture().astype(int))
        assert difference.mean() < 6  # lossy, yet the same picture


# ---------------------------------------------------------------- EXIF rotation


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_images_come_out_upright_with_their_mask(form: str, orientation: int) -> None:
    upright = UPRIGHT[orientation]
    stored, stored_mask = picture(), object_mask()
    options = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    data = encode(stored, form, exif=exif(orientation), **options)
    sample = pack(data, encode(np.ascontiguousarray(upright(stored_mask))))
    name = next(name for name in sample.components if name in ("jpg", "png", "webp"))
    image, expected = image_of(sample, name).astype(int), upright(stored).astype(int)
    assert image.shape == expected.shape == (sample.height, sample.width, 3)
    assert np.abs(image - expected).mean() < (3 if form == "JPEG" else 1e-9)
    np.testing.assert_array_equal(mask_of(sample), upright(stored_mask))
    # the object is where the picture's blue corner is: image and mask are turned the same
    inside = mask_of(sample) == 1
    assert image[inside][:, 2].mean() > 200 > 80 > image[~inside][:, 2].mean()
    packed = Image.open(io.BytesIO(sample.components[name]))
    assert packed.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_drawn_on_the_stored_pixels_is_turned_with_its_image(
    form: str, orientation: int
) -> None:
    data = encode(picture(), form, exif=exif(orientation))
    sample = pack(data, encode(object_mask()), encode(object_mask()))
    expected = UPRIGHT[orientation](object_mask())
    np.testing.assert_array_equal(mask_of(sample), expected)
    np.testing.assert_array_equal(decode_grey(sample.components["label.png"], "label"), expected)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_where_the_size_does_not_tell_the_mask_is_taken_to_be_upright(orientation: int) -> None:
    sample = pack(encode(picture(), "JPEG", exif=exif(orientation)), encode(object_mask()))
    np.testing.assert_array_equal(mask_of(sample), object_mask())


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_with_an_orientation_of_its_own_is_turned_by_it(form: str, orientation: int) -> None:
    rotation = exif(orientation)
    sample = pack(
        encode(picture(), "JPEG", exif=rotation), encode(object_mask(), form, exif=rotation)
    )
    np.testing.assert_array_equal(mask_of(sample), UPRIGHT[orientation](object_mask()))


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("what", ["mask", "label"])
def test_another_size_than_the_image_is_refused_with_both_sizes(what: str) -> None:
    for shape in ((HEIGHT + 1, WIDTH), (WIDTH, HEIGHT)):
        other = encode(np.zeros(shape, np.uint8))
        sizes = f"is {shape[1]}×{shape[0]} pixels, its image {WIDTH}×{HEIGHT}"
        with pytest.raises(SampleError, match=re.escape(sizes)) as caught:
            pack(JPEG, **{what: other})
        assert caught.value.stage == what


GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("data", "mode", "expected"),
    [
        # what auto takes as one object
        (encode(np.uint8([[0, 255]])), "auto", [[0, 1]]),
        (encode(np.uint8([[0, 1]])), "auto", [[0, 1]]),
        (encode(np.uint8([[0, 255]]), mode="1"), "auto", [[0, 1]]),
        (encode(np.uint16([[0, 65535]])), "auto", [[0, 1]]),
        (encode(np.uint16([[0, 255]])), "auto", [[0, 1]]),
        (encode(np.uint8([[255, 255]])), "auto", [[1, 1]]),
        (encode(np.uint8([[0, 0]])), "auto", [[0, 0]]),
        # ids
        (encode(np.uint8([[0, 1, 7, 255]])), "auto", [[0, 1, 7, 255]]),
        (encode(np.uint8([[0, 255]])), "ids", [[0, 255]]),
        (encode(np.uint16([[0, 3, 200, 255]])), "auto", [[0, 3, 200, 255]]),
        (encode(np.uint16([[0, 3, 200, 254]]), "TIFF"), "ids", [[0, 3, 200, 254]]),
        (palette_png(np.uint8([[0, 1, 15, 255]])), "auto", [[0, 1, 15, 255]]),
        (palette_png(np.uint8([[0, 1, 15, 20]])), "ids", [[0, 1, 15, 20]]),
        # grey in three channels, and with an alpha channel that says nothing
        (encode(np.uint8([[[0] * 3, [9] * 3, [255] * 3]])), "auto", [[0, 9, 255]]),
        (encode(np.uint8([[[0, 0, 0, 255], [255, 255, 255, 255]]])), "auto", [[0, 1]]),
        (encode(np.uint8([[[5, 255], [0, 255]]])), "auto", [[5, 0]]),
        # half the range and above
        (encode(np.uint8([[0, 127, 128, 255]])), "binary", [[0, 0, 1, 1]]),
        (encode(np.uint16([[0, 32767, 32768, 65535]])), "binary", [[0, 0, 1, 1]]),
        (encode(np.uint16([[0, 100, 255]])), "binary", [[0, 0, 1]]),
        (encode(np.uint8([[0, 1]])), "binary", [[0, 1]]),
        (encode(np.uint8([[0, 255]]), mode="1"), "binary", [[0, 1]]),
        (encode(GRADIENT), "binary", (GRADIENT >= 128).astype(int)),
        (encode(GRADIENT, "JPEG", quality=100), "binary", (GRADIENT >= 128).astype(int)),
        (encode(GRADIENT), "ids", GRADIENT),
        # GIF puts grey levels into a palette, in an order of its own
        (encode(np.uint8([[255, 0], [255, 255]]), "GIF"), "auto", [[1, 0], [1, 1]]),
        (encode(np.uint8([[0, 3], [7, 9]]), "GIF"), "auto", [[0, 3], [7, 9]]),
        (encode(np.uint8([[0, 255]]), "BMP"), "auto", [[0, 1]]),
        (encode(np.uint8([[0, 4]]), "WEBP", lossless=True), "auto", [[0, 4]]),
    ],
)
def test_mask_values(data: bytes, mode: MaskMode, expected: object) -> None:
    ids = decode_mask(data, mode)
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(
    ("data", "mode", "reason"),
    [
        (encode(GRADIENT), "auto", r"256 grey levels.*--mask-mode binary"),
        (encode(GRADIENT.astype(np.uint16) * 257), "auto", r"256 grey levels"),
        (encode(GRADIENT, "JPEG"), "auto", r"grey levels"),
        (encode(np.uint16([[0, 3, 300]])), "auto", r"values 0…300; they must fit in 8 bits"),
        (encode(np.uint16([[0, 1000]])), "ids", r"values 0…1000"),
        (encode(np.int32([[-5, 1]]), "TIFF"), "ids", r"values -5…1"),
        (encode(np.uint8([[[0, 9, 0], [255, 255, 255]]])), "auto", "has colours"),
        (encode(np.uint8([[[0, 0, 0, 255], [0, 0, 0, 0]]])), "auto", "see-through"),
        (encode(object_mask() * 20, "JPEG", quality=95), "auto", "lossy JPEG"),
        (encode(object_mask() * 20, "JPEG", quality=95), "ids", "lossy JPEG"),
        (encode(object_mask() * 20, "WEBP", quality=95), "ids", "has colours|lossy"),
        (encode(np.float32([[0, 1]]), "TIFF"), "auto", "pixel format F"),
    ],
)
def test_masks_that_are_refused(data: bytes, mode: MaskMode, reason: str) -> None:
    with pytest.raises(SampleError, match=reason) as caught:
        decode_mask(data, mode)
    assert caught.value.stage == "mask"


def test_the_packed_sample_counts_its_objects() -> None:
    mask = object_mask()
    mask[-1] = 255
    sample = pack(JPEG, encode(mask))
    info = json.loads(sample.components["json"])
    assert sample.proposals == info["proposals"] == 2
    share = np.isin(mask, (1, 2)).mean()
    assert info["object_share"] == pytest.approx(share, abs=1e-6)
    assert info == info | {"key": "key", "source": "source", "height": HEIGHT, "width": WIDTH}
    assert sample.components[MASK] == encode(mask)  # copied as it is
    assert Image.open(io.BytesIO(sample.components[MASK])).mode == "L"


# ---------------------------------------------------------------- labels


def test_labels_keep_their_indices() -> None:
    label = object_mask() * 10
    label[0] = 255
    for data in (encode(label), palette_png(label), encode(label.astype(np.uint16))):
        sample = pack(JPEG, label=data, num_classes=21)
        np.testing.assert_array_equal(decode_grey(sample.components["label.png"], "label"), label)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(object_mask(), "JPEG"), "lossy JPEG or WebP, which changes class indices"),
        (encode(np.full((HEIGHT, WIDTH), 21, np.uint8)), "class 21, .* only classes 0…20"),
        (encode(np.full((HEIGHT, WIDTH), 254, np.uint8)), "class 254"),
        (encode(np.full((HEIGHT, WIDTH), 256, np.uint16)), "values 256…256"),
        (encode(np.full((HEIGHT, WIDTH), 65535, np.uint16)), "values 65535…65535"),
        (encode(picture()), "has colours"),
    ],
)
def test_labels_that_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason) as caught:
        pack(JPEG, label=data, num_classes=21)
    assert caught.value.stage == "label"


def test_without_class_names_any_8_bit_index_is_taken() -> None:
    label = np.full((HEIGHT, WIDTH), 254, np.uint8)
    sample = pack(JPEG, label=encode(label))
    np.testing.assert_array_equal(decode_grey(sample.components["label.png"], "label"), label)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_decoded_pixels_are_memory_that_torch_may_share(form: str) -> None:
    """Of read-only memory torch warns that its behaviour is undefined, here an error."""
    for pixels in (
        decode_rgb(encode(picture(), form)),
        decode_grey(encode(object_mask()), "mask"),  # as Pillow writes it
        decode_grey(encode_png(object_mask()), "mask"),  # as shards hold it
        decode_label(encode_png(object_mask())),
    ):
        assert pixels.flags.writeable
        torch.from_numpy(pixels)


def test_decode_grey_refuses_what_no_shard_holds() -> None:
    with pytest.raises(SampleError, match="is RGB, not 8-bit grey"):
        decode_grey(encode(picture()), "mask")
    with pytest.raises(SampleError, match="cannot be decoded"):
        decode_grey(encode(object_mask(), "GIF"), "mask")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (301, 1), (180, 241)])
def test_masks_as_shards_hold_them_are_decoded_as_pillow_does(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    data = encode_png(values)
    found = decode_plain_png(data)
    assert found is not None
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(found, values)


def png(header: bytes, data: bytes) -> bytes:
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def grey(height: int, width: int, *form: int) -> bytes:
    return struct.pack(">IIBBBBB", width, height, *(form or (8, 0, 0, 0, 0)))


ROWS = zlib.compress(b"\2\1\1\1\2\1\1\1")  # two of three pixels, differences to the row above


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encode(object_mask()),  # its rows are filtered in another way
        palette_png(object_mask()),
        encode_png(object_mask().astype(np.uint16)),
        encode(picture()),
        encode_png(object_mask())[:-20],
        encode_png(object_mask())[:60] + b"x" + encode_png(object_mask())[61:],
        png(grey(2, 3, 8, 0, 0, 0, 1), ROWS),  # interlaced
        png(grey(2, 3, 4, 0, 0, 0, 0), ROWS),
        png(grey(2, 3) + b"x", ROWS),
        png(grey(3, 3), ROWS),  # one row is missing
        png(grey(1, 3), ROWS),  # one too many
        png(grey(2, 3), ROWS[:-1]),  # without the end of its checksum
        png(grey(0, 3), ROWS),
        png(grey(10_001, 10_000), ROWS),
        png(grey(2, 3), zlib.compress(bytes(1_000_000))),
        png(grey(2, 3), zlib.compress(b"\2\1\1\1\1\1\1\1")),  # a row's filter is another one
    ],
)
def test_all_other_pngs_are_left_to_pillow(data: bytes) -> None:
    assert decode_plain_png(png(grey(2, 3), ROWS)) is not None
    assert decode_plain_png(data) is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_of_both_depths_are_decoded_to_one_form(dtype: Any) -> None:
    ignored = np.iinfo(dtype).max
    label = np.array([[0, 7, ignored], [254, 1, 0]], dtype)
    found = decode_label(encode_png(label))
    assert found.dtype == np.int16
    assert found.tolist() == [[0, 7, -1], [254, 1, 0]]


def test_labels_that_are_none_are_refused() -> None:
    with pytest.raises(SampleError, match="has class 40000"):
        decode_label(encode_png(np.full((2, 2), 40000, np.uint16)))
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "PNG")
    with pytest.raises(SampleError, match="is RGB, not grey"):
        decode_label(image.getvalue())
    assert decode_label(encode_png(np.full((1, 1), 255, np.uint16))).tolist() == [[255]]
