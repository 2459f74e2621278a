"""Folders and PASCAL trees: what is matched with what, and what is said about the rest."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sample import decode_mask, pack_sample
from data_pipeline.sources.folder import list_folder
from data_pipeline.sources.generated import list_scenes
from data_pipeline.sources.item import FileItem, Listing, read_class_names, unique_keys
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


def keys(listing: Listing) -> list[str]:
    return [item.key for item in listing.items]


def failures(listing: Listing) -> dict[str, str]:
    assert all(failure.stage == "match" for failure in listing.failures)
    return {failure.source: failure.reason for failure in listing.failures}


# ---------------------------------------------------------------- folders


def test_images_and_masks_are_matched_by_path_and_stem(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["b", "a", "sub/a", "sub/deeper/c"])
    listing = list_folder(images, masks)
    assert keys(listing) == ["a", "b", "sub/a", "sub/deeper/c"]
    assert listing.failures == []
    by_key = {item.key: item for item in listing.items}
    assert by_key["sub/a"].source == "sub/a.jpg"
    raw = by_key["sub/a"].read()  # the third of the pictures
    assert raw.image == (images / "sub" / "a.jpg").read_bytes()
    np.testing.assert_array_equal(decode_mask(raw.mask or b"", "auto"), object_mask(2))
    assert raw.label is None
    assert by_key["a"].sizes() == (
        (images / "a.jpg").stat().st_size,
        (masks / "a.png").stat().st_size,
    )


def test_without_masks_images_stand_alone(tmp_path: Path) -> None:
    images, _ = folder_pair(tmp_path, ["a", "b"])
    listing = list_folder(images, None)
    assert keys(listing) == ["a", "b"]
    assert [item.read().mask for item in listing.items] == [None, None]


def test_labels_need_a_partner_too(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a", "b"], labels=True)
    (tmp_path / "labels" / "b.png").unlink()
    listing = list_folder(images, masks, tmp_path / "labels", ("background", "thing", "other"))
    assert keys(listing) == ["a"]
    assert failures(listing) == {"b.jpg": "no label of that stem"}
    assert listing.classes == ("background", "thing", "other")
    raw = listing.items[0].read()
    sample = pack_sample("a", "a.jpg", raw, "auto", 3)
    assert set(sample.components) == {"jpg", "mask.png", "label.png", "json"}


def test_what_has_no_partner_is_named(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a", "no_mask", "sub/no_image"])
    (masks / "no_mask.png").unlink()
    (images / "sub" / "no_image.jpg").unlink()
    listing = list_folder(images, masks)
    assert keys(listing) == ["a"]
    assert failures(listing) == {
        "no_mask.jpg": "no mask of that stem",
        str(masks / "sub" / "no_image.png"): "mask without an image",
    }


def test_of_duplicate_stems_none_wins(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a", "two_images", "two_masks"])
    write(images / "two_images.png", encode(picture()))
    write(masks / "two_masks.gif", encode(object_mask(), "GIF"))
    listing = list_folder(images, masks)
    assert keys(listing) == ["a"]
    assert failures(listing) == {
        "two_images.jpg": "duplicate stem: two_images.jpg, two_images.png",
        "two_images.png": "duplicate stem: two_images.jpg, two_images.png",
        "two_masks.jpg": "several masks: two_masks.gif, two_masks.png",
    }


def test_hidden_and_other_files_are_passed_over_but_no_picture_is(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a"])
    for name in (".hidden.jpg", ".git/b.jpg", "notes.txt", "Thumbs.db", "a.jpg.part"):
        write(images / name, b"x")
    for name in ("phone.heic", "old.GIF"):
        write(images / name, b"x")
    write(masks / "phone.png", encode(object_mask()))
    listing = list_folder(images, masks)
    assert keys(listing) == ["a"]
    assert failures(listing) == {
        "old.GIF": ".GIF is not read",
        "phone.heic": ".heic is not read",
    }


def test_suffixes_in_capitals_and_dots_in_names(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    write(images / "IMG_1.JPG", encode(picture(), "JPEG"))
    write(masks / "IMG_1.PNG", encode(object_mask()))
    write(images / "v1.2.jpeg", encode(picture(), "JPEG"))
    write(masks / "v1.2.bmp", encode(object_mask(), "BMP"))
    listing = list_folder(images, masks)
    assert listing.failures == []
    assert [item.source for item in listing.items] == ["IMG_1.JPG", "v1.2.jpeg"]
    assert re.fullmatch(r"v1_2-[0-9a-f]{8}", keys(listing)[1])


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
    listing = list_folder(images, None)
    found = keys(listing)
    assert {"cats/a", "one", "gone", "cats/up/dog/b"} <= set(found)
    assert not [key for key in found if "circle" in key or "pipe" in key]
    assert len(found) == 4
    gone = next(item for item in listing.items if item.key == "gone")
    with pytest.raises(SampleError, match="No such file") as caught:
        gone.read()
    assert caught.value.stage == "image"
    assert gone.sizes() == (-1,)


@pytest.mark.skipif(os.name != "posix", reason="file names of bytes are POSIX")
def test_a_file_name_that_is_not_utf8_is_taken(tmp_path: Path) -> None:
    images, _ = folder_pair(tmp_path, ["a"])
    (images / "a.jpg").rename(Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9.jpg")))
    listing = list_folder(images, None)
    assert re.fullmatch(r"caf_-[0-9a-f]{8}", keys(listing)[0])
    info = pack_sample("key", listing.items[0].source, listing.items[0].read(), "auto").components
    assert os.fsencode(json.loads(info["json"])["source"]) == b"caf\xe9.jpg"


def test_names_whose_keys_meet_fail_all(tmp_path: Path) -> None:
    raw = FileItem("ä", "ä.jpg", tmp_path, None, None)
    changed = unique_keys([raw])[0][0].key
    kept, failed = unique_keys([raw, FileItem(changed, f"{changed}.jpg", tmp_path, None, None)])
    assert kept == []
    assert {failure.source for failure in failed} == {"ä.jpg", f"{changed}.jpg"}
    assert {failure.key for failure in failed} == {changed}


def test_missing_and_empty_folders_are_the_users_to_mend(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"empty holds no image .*give --images"):
        list_folder(empty, masks)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        list_folder(tmp_path / "nowhere", masks)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        list_folder(images, tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"a\.jpg is not a folder"):
        list_folder(images / "a.jpg", masks)
    listing = list_folder(images, empty)
    assert (keys(listing), failures(listing)) == ([], {"a.jpg": "no mask of that stem"})


# ---------------------------------------------------------------- PASCAL

SPLITS = {"trainaug": ["2007_000032", "2008_000001"], "val": ["2007_000033"]}


def test_the_released_layout_with_masks_and_labels(tmp_path: Path) -> None:
    root = released_tree(tmp_path / "VOCSegmentation", SPLITS)
    listing = list_voc(root, "trainaug", masks="saliency_supervised_model")
    assert keys(listing) == SPLITS["trainaug"]
    assert listing.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 21
    assert listing.failures == []
    item = listing.items[1]
    assert item.source == "images/2008_000001.jpg"
    sample = pack_sample(item.key, item.source, item.read(), "auto", 21)
    assert set(sample.components) == {"jpg", "mask.png", "label.png", "json"}
    label = decode_mask(sample.components["label.png"], "ids")
    expected = object_mask(1)
    expected[0] = 255
    np.testing.assert_array_equal(label, expected)  # palette indices, not colours
    np.testing.assert_array_equal(decode_mask(sample.components["mask.png"], "ids"), object_mask(1))
    assert listing.description["masks"] == "saliency_supervised_model"


def test_the_released_layout_without_labels(tmp_path: Path) -> None:
    root = released_tree(tmp_path, SPLITS)
    listing = list_voc(root, "val", masks="saliency_unsupervised_model", labels=False)
    assert keys(listing) == SPLITS["val"]
    assert listing.classes == ()
    assert listing.items[0].read().label is None


@pytest.mark.parametrize("below", ["", "VOCdevkit"])
def test_vocdevkit_from_its_top_or_inside(tmp_path: Path, below: str) -> None:
    vocdevkit_tree(tmp_path / below, SPLITS)
    for root in (tmp_path, tmp_path / below, tmp_path / below / "VOC2012"):
        listing = list_voc(root, "trainaug")
        assert keys(listing) == SPLITS["trainaug"]
        raw = listing.items[0].read()
        assert raw.mask is None
        assert raw.label is not None
        assert listing.items[0].source == "JPEGImages/2007_000032.jpg"


def test_vocdevkit_with_masks_from_elsewhere(tmp_path: Path) -> None:
    vocdevkit_tree(tmp_path, SPLITS)
    masks = tmp_path / "my_masks"
    write(masks / "2007_000032.png", encode(object_mask(5)))
    listing = list_voc(tmp_path, "trainaug", masks=str(masks))
    assert keys(listing) == ["2007_000032"]
    np.testing.assert_array_equal(
        decode_mask(listing.items[0].read().mask or b"", "auto"), object_mask(5)
    )
    missing = failures(listing)["JPEGImages/2008_000001.jpg"]
    assert missing == f"no mask: {masks / '2008_000001.png'} is missing"


def test_the_augmented_labels_are_preferred(tmp_path: Path) -> None:
    vocdevkit_tree(tmp_path, {"train": ["a"]})
    augmented = np.full((20, 30), 7, np.uint8)
    write(tmp_path / "VOC2012" / "SegmentationClassAug" / "a.png", encode(augmented))
    raw = list_voc(tmp_path, "train").items[0].read()
    np.testing.assert_array_equal(decode_mask(raw.label or b"", "ids"), augmented)


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
    listing = list_voc(root, "val")
    assert keys(listing) == []
    assert "2007_000033.jpg is missing" in failures(listing)["JPEGImages/2007_000033.jpg"]
    (root / "SegmentationClass").rename(root / "labels")
    with pytest.raises(InputError, match=r"no folder of labels.*--no-labels"):
        list_voc(root, "val")
    assert keys(list_voc(root, "trainaug", labels=False)) == SPLITS["trainaug"]


def test_lists_may_have_columns_and_blank_lines_but_no_paths(tmp_path: Path) -> None:
    root = released_tree(tmp_path, SPLITS)
    names = "2008_000001 -1\r\n\r\n2007_000032  1\n2008_000001\n"
    write(root / "sets" / "cat.txt", b"\xef\xbb\xbf" + names.encode())
    assert keys(list_voc(root, "cat")) == SPLITS["trainaug"]  # the repeated name is one sample
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
        item.source
        for seed, size in ((0, 32), (1, 32), (0, 48))
        for item in list_scenes(3, seed, size).items
    }
    assert len(sources) == 9
    first, again = (list_scenes(1, 7, 32).items[0].read() for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("count", "seed", "size"),
    [(0, 0, 48), (1, -1, 48), (1, 2**64, 48), (1, 0, 15), (1, 0, 5000)],
)
def test_scenes_out_of_range_are_refused(count: int, seed: int, size: int) -> None:
    with pytest.raises(InputError, match=f"count {count}, size {size}, seed {seed}"):
        list_scenes(count, seed, size)
