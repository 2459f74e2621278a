"""DAVIS 2016 and 2017: the lists of both, and annotations as masks and labels."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sources.davis import decode_objects, list_davis
from tests.sample_data import encode, object_mask, palette_png, picture, write
from tests.source_data import contents, pixels

SEQUENCES = {"train": ("bear", "bus"), "val": ("cows",)}
FRAMES = ("00000", "00001")


def davis_tree(root: Path, year: int) -> Path:
    """The layout of the release of a year; that of 2017 has lists of both."""
    for split, sequences in SEQUENCES.items():
        pairs = []
        for sequence in sequences:
            for number, frame in enumerate(FRAMES):
                name = f"480p/{sequence}/{frame}"
                mask = object_mask(number)
                png = encode((mask > 0).astype(np.uint8) * 255) if year == 2016 else None
                write(root / "JPEGImages" / f"{name}.jpg", encode(picture(number), "JPEG"))
                write(root / "Annotations" / f"{name}.png", png or palette_png(mask))
                pairs.append(f"/JPEGImages/{name}.jpg /Annotations/{name}.png \n")
        sets = root / "ImageSets"
        if year == 2016:
            write(sets / "480p" / f"{split}.txt", "".join(pairs).encode())
        else:
            for each in ("2016", "2017"):
                write(sets / each / f"{split}.txt", "\n".join(sequences).encode())
    return root


@pytest.mark.parametrize("release", [2016, 2017])
def test_foreground_of_2016_from_both_releases(tmp_path: Path, release: int) -> None:
    listing = list_davis(davis_tree(tmp_path, release), "train")
    items, failed = contents(listing)
    assert failed == {}
    assert list(items) == ["bear/00000", "bear/00001", "bus/00000", "bus/00001"]
    assert items["bus/00001"].source == "bus/00001.jpg"
    raw = items["bus/00001"].read()
    for values in (raw.mask, raw.label):
        np.testing.assert_array_equal(values, object_mask(1) > 0)
        assert isinstance(values, np.ndarray)
        assert values.dtype == np.uint8
    assert listing.classes == ("background", "object")
    assert listing.roots == (tmp_path / "JPEGImages/480p", tmp_path / "Annotations/480p")


def test_objects_of_2017(tmp_path: Path) -> None:
    davis_tree(tmp_path, 2017)
    listing = list_davis(tmp_path, "val", 2017)
    items, _ = contents(listing)
    raw = items["cows/00001"].read()
    np.testing.assert_array_equal(raw.mask, object_mask(1))
    np.testing.assert_array_equal(raw.label, object_mask(1))
    assert listing.classes[:3] == ("background", "object 1", "object 2")


def test_masks_from_elsewhere_or_none_and_no_labels(tmp_path: Path) -> None:
    davis_tree(tmp_path, 2016)
    for frame in FRAMES:
        write(tmp_path / "saliency" / "cows" / f"{frame}.png", encode(object_mask(4)))
    for masks in ("saliency", str(tmp_path / "saliency")):
        items, failed = contents(list_davis(tmp_path, "val", masks=masks))
        assert failed == {}
        raw = items["cows/00000"].read()
        np.testing.assert_array_equal(pixels(raw.mask), object_mask(4))
        np.testing.assert_array_equal(raw.label, object_mask(0) > 0)
    (tmp_path / "saliency" / "cows" / "00001.png").unlink()
    _, failed = contents(list_davis(tmp_path, "val", masks="saliency"))
    missing = tmp_path / "saliency" / "cows" / "00001.png"
    assert failed == {"cows/00001.jpg": f"no mask: {missing} is missing"}
    (tmp_path / "Annotations").rename(tmp_path / "gone")
    listing = list_davis(tmp_path, "val", masks=None, labels=False)
    raw = contents(listing)[0]["cows/00000"].read()
    assert (raw.mask, raw.label) == (None, None)
    assert listing.classes == ()
    with pytest.raises(InputError, match=r"Annotations/480p is not a folder; give --root"):
        list_davis(tmp_path, "val", masks=None)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    davis_tree(tmp_path, 2017)
    (tmp_path / "Annotations/480p/bear/00001.png").unlink()
    for frame in FRAMES:
        (tmp_path / "JPEGImages/480p/bus" / f"{frame}.jpg").unlink()
    items, failed = contents(list_davis(tmp_path, "train"))
    assert list(items) == ["bear/00000"]
    assert failed == {
        "bear/00001.jpg": (
            f"no annotation: {tmp_path / 'Annotations/480p/bear/00001.png'} is missing"
        ),
        "bus": f"no image: {tmp_path / 'JPEGImages/480p/bus'} holds no .jpg",
    }
    with pytest.raises(InputError, match=r"no split 'test' in .*; --split can be one of: train, v"):
        list_davis(tmp_path, "test")
    with pytest.raises(InputError, match="--year is 2018"):
        list_davis(tmp_path, "val", 2018)
    with pytest.raises(InputError, match=r"1080p is not a folder; .*--resolution"):
        list_davis(tmp_path, "val", resolution="1080p")
    with pytest.raises(InputError, match="no folder of masks 'saliency'"):
        list_davis(tmp_path, "val", masks="saliency")


@pytest.mark.parametrize("line", ["../../etc", "/JPEGImages/480p/../a.jpg", "/", "a/b/c"])
def test_lists_name_sequences_or_frames_only(tmp_path: Path, line: str) -> None:
    davis_tree(tmp_path, 2017)
    write(tmp_path / "ImageSets/2017/odd.txt", f"{line} x\n".encode())
    with pytest.raises(InputError, match="expected the name of a sequence"):
        list_davis(tmp_path, "odd", 2017)


def test_what_is_no_annotation_is_refused() -> None:
    with pytest.raises(SampleError, match="is RGB; DAVIS has grey or palette annotations"):
        decode_objects(encode(picture()), 2017)
    white = np.repeat(255 * (object_mask() > 0)[..., None], 3, 2).astype(np.uint8)
    np.testing.assert_array_equal(decode_objects(encode(white), 2016), object_mask() > 0)
    deep = encode(object_mask().astype(np.uint16))
    with pytest.raises(SampleError, match="is I;16; DAVIS"):
        decode_objects(deep, 2017)
