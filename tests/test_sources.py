"""Folders, PASCAL trees and scenes: what is matched with what, and what is said about the rest."""

import os
import pickle
import re
import tempfile
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.errors import InputError, SampleError
from data_pipeline.scratch import scratch_database
from data_pipeline.sources.folder import list_folder
from data_pipeline.sources.generated import list_scenes
from data_pipeline.sources.item import Failure, read_class_names
from data_pipeline.sources.voc import VOC_CLASSES, list_voc
from tests.sample_data import (
    encode,
    folder_pair,
    object_mask,
    picture,
    released_tree,
    vocdevkit_tree,
    write,
)
from tests.source_data import contents, pixels

# ---------------------------------------------------------------- folders


def test_images_and_masks_are_matched_by_path_and_stem(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["b", "a", "sub/a", "sub/deeper/c"])
    listing = list_folder(images, masks)
    items, failed = contents(listing)
    assert list(items) == ["a", "b", "sub/a", "sub/deeper/c"]
    assert failed == {}
    assert items["sub/a"].source == "sub/a.jpg"
    raw = items["sub/a"].read()  # the third of the pictures
    assert raw.image == (images / "sub" / "a.jpg").read_bytes()
    np.testing.assert_array_equal(pixels(raw.mask), object_mask(2))
    assert raw.label is None
    assert items["a"].sizes() == (
        (images / "a.jpg").stat().st_size,
        (masks / "a.png").stat().st_size,
    )
    assert pickle.loads(pickle.dumps(items["a"])).read() == items["a"].read()
    assert listing.roots == (images, masks)
    assert listing.description == {
        "source": "folder",
        "images": str(images),
        "masks": str(masks),
        "labels": "",
    }


def test_without_masks_images_stand_alone(tmp_path: Path) -> None:
    images, _ = folder_pair(tmp_path, ["a", "b"])
    items, _ = contents(list_folder(images))
    assert {key: item.read().mask for key, item in items.items()} == {"a": None, "b": None}


def test_labels_need_a_partner_too(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a", "b"], labels=True)
    (tmp_path / "labels" / "b.png").unlink()
    listing = list_folder(images, masks, tmp_path / "labels", ("background", "thing", "other"))
    items, failed = contents(listing)
    assert list(items) == ["a"]
    assert failed == {"b.jpg": "no label of that stem"}
    assert listing.classes == ("background", "thing", "other")
    np.testing.assert_array_equal(pixels(items["a"].read().label), object_mask(0))


def test_what_has_no_partner_is_named(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a", "no_mask", "sub/no_image"])
    (masks / "no_mask.png").unlink()
    (images / "sub" / "no_image.jpg").unlink()
    items, failed = contents(list_folder(images, masks))
    assert list(items) == ["a"]
    assert failed == {
        "no_mask.jpg": "no mask of that stem",
        str(masks / "sub" / "no_image.png"): "mask without an image",
    }


def test_masks_of_one_stem_are_ambiguous_and_images_of_one_stem_both_listed(
    tmp_path: Path,
) -> None:
    images, masks = folder_pair(tmp_path, ["a", "two_images", "two_masks"])
    write(images / "two_images.png", encode(picture()))
    write(masks / "two_masks.gif", encode(object_mask(), "GIF"))
    entries = list(list_folder(images, masks).entries)
    assert sorted((entry.key, entry.source) for entry in entries) == [
        ("a", "a.jpg"),
        ("two_images", "two_images.jpg"),  # the plan fails them, as they share a key
        ("two_images", "two_images.png"),
        ("two_masks", "two_masks.jpg"),
    ]
    reasons = [entry.reason for entry in entries if isinstance(entry, Failure)]
    assert reasons == ["several masks: two_masks.gif, two_masks.png"]


def test_masks_without_folders_belong_to_the_one_image_of_their_name(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["x/a", "x/b", "y/b", "c", "z/c", "z/d", "e"])
    for path in sorted(masks.rglob("*.png")):
        if path.parent != masks:
            path.unlink()
    for number, name in enumerate(["a", "b", "d"]):
        write(masks / f"{name}.png", encode(object_mask(number)))
    write(masks / "z" / "d.png", encode(object_mask(7)))  # of its own path: this one counts
    items, failed = contents(list_folder(images, masks))
    assert list(items) == ["c", "e", "x/a", "z/d"]
    np.testing.assert_array_equal(pixels(items["x/a"].read().mask), object_mask(0))
    np.testing.assert_array_equal(pixels(items["z/d"].read().mask), object_mask(7))
    assert failed == {
        "x/b.jpg": "no mask of that stem",  # b.png could be of either
        "y/b.jpg": "no mask of that stem",
        "z/c.jpg": "no mask of that stem",  # c.png is the mask of c.jpg
        str(masks / "b.png"): "mask without an image",
        str(masks / "d.png"): "mask without an image",
    }


def test_hidden_and_other_files_are_passed_over_but_no_picture_is(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a"])
    for name in (".hidden.jpg", ".git/b.jpg", "notes.txt", "Thumbs.db", "a.jpg.part"):
        write(images / name, b"x")
    for name in ("phone.heic", "old.GIF"):
        write(images / name, b"x")
    write(masks / "phone.png", encode(object_mask()))
    items, failed = contents(list_folder(images, masks))
    assert list(items) == ["a"]
    assert failed == {"old.GIF": ".GIF is not read", "phone.heic": ".heic is not read"}


def test_suffixes_in_capitals_and_dots_in_names(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    write(images / "IMG_1.JPG", encode(picture(), "JPEG"))
    write(masks / "IMG_1.PNG", encode(object_mask()))
    write(images / "v1.2.jpeg", encode(picture(), "JPEG"))
    write(masks / "v1.2.bmp", encode(object_mask(), "BMP"))
    items, failed = contents(list_folder(images, masks))
    assert failed == {}
    assert {key: item.source for key, item in items.items()} == {
        "IMG_1": "IMG_1.JPG",
        "v1.2": "v1.2.jpeg",
    }


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    store, _ = folder_pair(tmp_path / "store", ["cat/a", "dog/b"])
    images = tmp_path / "linked"
    images.mkdir()
    (images / "cats").symlink_to(store / "cat")
    (images / "one.jpg").symlink_to(store / "dog" / "b.jpg")
    (images / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (images / "circle").symlink_to(images)
    (store / "cat" / "up").symlink_to(store)
    (store / "dog" / "over").symlink_to(store / "cat")
    os.mkfifo(images / "pipe.jpg")  # reading it would hang
    items, failed = contents(list_folder(images))
    assert list(items) == ["cats/a", "cats/up/dog/b", "gone", "one"]
    assert failed == {}
    with pytest.raises(SampleError, match="No such file") as caught:
        items["gone"].read()
    assert caught.value.stage == "image"
    assert items["gone"].sizes() == (-1,)


@pytest.mark.skipif(os.name != "posix", reason="file names of bytes are POSIX")
def test_a_file_name_that_is_not_utf8_is_taken(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a"])
    for folder, suffix in ((images, ".jpg"), (masks, ".png")):
        new = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9" + suffix.encode()))
        (folder / f"a{suffix}").rename(new)
    items, failed = contents(list_folder(images, masks))
    assert failed == {}
    (item,) = items.values()
    assert os.fsencode(item.source) == b"caf\xe9.jpg"
    assert item.read().image.startswith(b"\xff\xd8")


def test_missing_and_empty_folders_are_the_users_to_mend(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"empty holds no image .*give --images"):
        list_folder(empty, masks)
    with pytest.raises(InputError, match=r"nowhere is not a folder; .* --images"):
        list_folder(tmp_path / "nowhere", masks)
    with pytest.raises(InputError, match=r"nowhere is not a folder; .* --masks"):
        list_folder(images, tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"a\.jpg is not a folder"):
        list_folder(images / "a.jpg", masks)
    assert contents(list_folder(images, empty)) == ({}, {"a.jpg": "no mask of that stem"})


def test_a_folder_that_vanishes_while_it_is_listed_ends_the_listing(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a", "sub/b"])
    listing = list_folder(images, masks)
    for path in (masks / "a.png", masks / "sub" / "b.png"):
        path.unlink()
    (masks / "sub").rmdir()
    masks.rmdir()
    with pytest.raises(InputError, match=r"masks cannot be listed \(No such file"):
        list(listing.entries)


def test_folders_elsewhere(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a", "sub/b", "sub/.hidden/c", "no_mask"])
    (masks / "no_mask.png").unlink()
    system = fsspec.filesystem("memory")
    top = f"/{tmp_path.name}"  # the memory is one for all tests
    system.put(str(tmp_path), top, recursive=True)
    listing = list_folder(f"memory:/{top}/images", f"memory:/{top}/masks/")
    items, failed = contents(listing)
    assert list(items) == ["a", "sub/b"]
    assert failed == {"no_mask.jpg": "no mask of that stem"}
    assert items["sub/b"].source == "sub/b.jpg"
    raw = items["sub/b"].read()
    assert raw.image == (images / "sub" / "b.jpg").read_bytes()
    assert raw.mask == (masks / "sub" / "b.png").read_bytes()
    assert listing.roots == ()
    mixed, _ = contents(list_folder(f"memory:/{top}/images", masks))
    assert list(mixed) == ["a", "sub/b"]
    with pytest.raises(InputError, match="nowhere is not a folder"):
        list_folder("memory://nowhere")


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    peaks = []
    for count in (2000, 6000):
        folder = tmp_path / str(count)
        for kind, suffix in (("images", "jpg"), ("masks", "png")):
            (folder / kind).mkdir(parents=True)
            for number in range(count):
                (folder / kind / f"a_rather_long_name_{number:08d}.{suffix}").touch()
        tracemalloc.start()
        assert sum(1 for _ in list_folder(folder / "images", folder / "masks").entries) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000  # 4,000 more pairs of names alone are 600 kB


def test_what_is_sorted_on_disk_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    images, masks = folder_pair(tmp_path, ["a", "b"])
    entries = iter(list_folder(images, masks).entries)
    next(entries)
    assert len(list(temporary.iterdir())) == 1
    del entries  # abandoned half-way
    assert list(temporary.iterdir()) == []
    full = scratch_database("PRAGMA max_page_count = 2; CREATE TABLE file (name TEXT)")
    with pytest.raises(InputError, match="give TMPDIR a folder with space"), full as database:
        database.executemany("INSERT INTO file VALUES (?)", [("x" * 1000,)] * 100)
    assert list(temporary.iterdir()) == []


# ---------------------------------------------------------------- PASCAL

SPLITS = {"trainaug": ["2007_000032", "2008_000001"], "val": ["2007_000033"]}


def test_the_released_layout_with_masks_and_labels(tmp_path: Path) -> None:
    root = released_tree(tmp_path / "VOCSegmentation", SPLITS)
    listing = list_voc(root, "trainaug", masks="saliency_supervised_model")
    items, failed = contents(listing)
    assert list(items) == SPLITS["trainaug"]
    assert failed == {}
    assert listing.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 21
    assert items["2008_000001"].source == "images/2008_000001.jpg"
    raw = items["2008_000001"].read()
    expected = object_mask(1)
    expected[0] = 255
    np.testing.assert_array_equal(pixels(raw.label), expected)  # palette indices, not colours
    np.testing.assert_array_equal(pixels(raw.mask), object_mask(1))
    assert listing.description["masks"] == "saliency_supervised_model"
    folders = ("images", "saliency_supervised_model", "SegmentationClassAug")
    assert listing.roots == tuple(root / name for name in folders)


def test_the_released_layout_without_labels(tmp_path: Path) -> None:
    root = released_tree(tmp_path, SPLITS)
    listing = list_voc(root, "val", masks="saliency_unsupervised_model", labels=False)
    items, _ = contents(listing)
    assert list(items) == SPLITS["val"]
    assert listing.classes == ()
    assert items["2007_000033"].read().label is None


@pytest.mark.parametrize("below", ["", "VOCdevkit"])
def test_vocdevkit_from_its_top_or_inside(tmp_path: Path, below: str) -> None:
    vocdevkit_tree(tmp_path / below, SPLITS)
    for root in (tmp_path, tmp_path / below, tmp_path / below / "VOC2012"):
        items, _ = contents(list_voc(root, "trainaug"))
        assert list(items) == SPLITS["trainaug"]
        raw = items["2007_000032"].read()
        assert raw.mask is None
        assert raw.label is not None
        assert items["2007_000032"].source == "JPEGImages/2007_000032.jpg"


def test_vocdevkit_with_masks_from_elsewhere(tmp_path: Path) -> None:
    vocdevkit_tree(tmp_path, SPLITS)
    masks = tmp_path / "my_masks"
    write(masks / "2007_000032.png", encode(object_mask(5)))
    items, failed = contents(list_voc(tmp_path, "trainaug", masks=str(masks)))
    assert list(items) == ["2007_000032"]
    np.testing.assert_array_equal(pixels(items["2007_000032"].read().mask), object_mask(5))
    reason = f"no mask: {masks / '2008_000001.png'} is missing"
    assert failed == {"JPEGImages/2008_000001.jpg": reason}


@pytest.mark.parametrize("tree", [released_tree, vocdevkit_tree])
def test_only_trainaug_takes_the_augmented_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tree: Callable[..., Path]
) -> None:
    """The published code's choice, with another label of the same images in either folder."""
    splits = {"trainaug": ["a", "b"], "train": ["a"], "val": ["b"], "cat": ["a"]}
    tree(tmp_path, splits)
    root = tmp_path if tree is released_tree else tmp_path / "VOC2012"
    of_folder = {"SegmentationClassAug": 7, "SegmentationClass": 3}
    for folder, value in of_folder.items():
        for name in "ab":
            write(root / folder / f"{name}.png", encode(np.full((20, 30), value, np.uint8)))

    def found(split: str) -> set[int]:
        listing = list_voc(tmp_path, split)
        items, failed = contents(listing)
        assert (sorted(items), failed) == (sorted(splits[split]), {})
        [value] = {int(v) for item in items.values() for v in np.unique(pixels(item.read().label))}
        assert of_folder[str(listing.description["labels"])] == value
        return {value}

    expected = {"trainaug": {7}, "train": {3}, "val": {3}, "cat": {3}}
    assert {split: found(split) for split in splits} == expected
    assert caplog.text == ""
    # the augmented ones are of trainaug alone, as some copies have them
    (root / "SegmentationClassAug" / "b.png").unlink()
    assert found("val") == {3}
    # where a folder is missing, the other is better than nothing, and a warning tells
    (root / "SegmentationClass").rename(root / "away")
    assert found("train") == {7}
    assert "has no SegmentationClass, where the published labels of train are" in caplog.text
    assert "taken from SegmentationClassAug" in caplog.text


def test_an_unknown_split_lists_the_splits(tmp_path: Path) -> None:
    root = released_tree(tmp_path, SPLITS)
    for split in ("training", "../sets/val", ""):
        with pytest.raises(InputError, match=r"--split can be one of: trainaug, val$"):
            list_voc(root, split)


def test_what_is_missing_from_the_tree_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no PASCAL tree"):
        list_voc(tmp_path / "nowhere", "val")
    with pytest.raises(InputError, match="is no PASCAL tree"):
        list_voc(tmp_path, "val")
    root = vocdevkit_tree(tmp_path, SPLITS) / "VOC2012"
    with pytest.raises(InputError, match=r"no folder of masks 'saliency' .*JPEGImages"):
        list_voc(root, "val", masks="saliency")
    (root / "JPEGImages" / "2007_000033.jpg").unlink()
    items, failed = contents(list_voc(root, "val"))
    assert items == {}
    assert "2007_000033.jpg is missing" in failed["JPEGImages/2007_000033.jpg"]
    (root / "SegmentationClass").rename(root / "labels")
    with pytest.raises(InputError, match=r"no folder of labels.*--no-labels"):
        list_voc(root, "val")
    assert list(contents(list_voc(root, "trainaug", labels=False))[0]) == SPLITS["trainaug"]


def test_lists_may_have_columns_and_blank_lines_but_no_paths(tmp_path: Path) -> None:
    root = released_tree(tmp_path, SPLITS)
    names = "2008_000001 -1\r\n\r\n2007_000032  1\n2008_000001\n"
    write(root / "sets" / "cat.txt", b"\xef\xbb\xbf" + names.encode())
    # the repeated name is one sample
    assert sorted(entry.key for entry in list_voc(root, "cat").entries) == SPLITS["trainaug"]
    for text, reason in (
        (b"", "is empty"),
        (b"/JPEGImages/a.jpg /SegmentationClass/a.png", "names '/JPEGImages/a.jpg'"),
        (b"../secret", "names '../secret'"),
        (b"caf\xe9", "not UTF-8"),
    ):
        write(root / "sets" / "bad.txt", text)
        with pytest.raises(InputError, match=re.escape(reason)):
            list_voc(root, "bad")


def test_classes_come_from_classes_txt_where_there_is_one(tmp_path: Path) -> None:
    root = released_tree(tmp_path, SPLITS)
    write(root / "classes.txt", b"background\n\n  Katze \nHund\n")
    assert list_voc(root, "val").classes == ("background", "Katze", "Hund")
    assert list_voc(root, "val", labels=False).classes == ()
    write(root / "classes.txt", b"\n")
    with pytest.raises(InputError, match=r"classes\.txt names 0 classes"):
        list_voc(root, "val")


def test_class_names_fit_8_bit_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "names", "".join(f"class {n}\n" for n in range(255)).encode())
    assert len(read_class_names(path)) == 255
    path.write_text("".join(f"class {n}\n" for n in range(256)))
    with pytest.raises(InputError, match="names 256 classes; expected one name a line, 1 to 255"):
        read_class_names(path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_class_names(path)
    with pytest.raises(InputError, match="No such file"):
        read_class_names(tmp_path / "nowhere")


# ---------------------------------------------------------------- scenes


def test_scenes_are_told_apart_by_seed_size_and_number() -> None:
    sources = {
        entry.source
        for seed, size in ((0, 32), (1, 32), (0, 48))
        for entry in list_scenes(3, seed, size).entries
    }
    assert len(sources) == 9
    first, again = (next(iter(list_scenes(1, 7, 32).entries)) for _ in range(2))
    assert not isinstance(first, Failure)
    assert not isinstance(again, Failure)
    assert first.read() == again.read()


def test_scenes_are_listed_as_one_goes() -> None:
    listing = list_scenes(10**12, 0, 32)
    assert [entry.key for entry in islice(listing.entries, 2)] == [
        "scene_000_0000000",
        "scene_000_0000001",
    ]


@pytest.mark.parametrize(
    ("count", "seed", "size"),
    [(0, 0, 48), (1, -1, 48), (1, 2**64, 48), (1, 0, 15), (1, 0, 5000)],
)
def test_scenes_out_of_range_are_refused(count: int, seed: int, size: int) -> None:
    with pytest.raises(InputError, match=f"count {count}, size {size}, seed {seed}"):
        list_scenes(count, seed, size)
