"""ImageNet and ImageNet-S: class folders, and classes in the colours of a pixel."""

import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sources.imagenet import list_imagenet
from data_pipeline.sources.imagenet_s import decode_annotation, list_imagenet_s
from tests.sample_data import HEIGHT, WIDTH, encode, object_mask, picture, write
from tests.source_data import contents, pixels

WORDNET_IDS = tuple(f"n{10_000_000 + 7 * number:08d}" for number in range(50))


def class_values(number: int) -> NDArray[np.uint16]:
    """Classes [H, W]: other, one class, and a part that is ignored."""
    values = np.where(object_mask(number) == 1, number, 0).astype(np.uint16)
    values[-2:] = 1000
    return values


def annotation(values: NDArray[np.uint16]) -> bytes:
    """As the release stores it: red + 256 · green."""
    return encode(np.stack([values % 256, values // 256, 0 * values], -1).astype(np.uint8))


def imagenet_tree(root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    for split in splits:
        for wordnet_id in WORDNET_IDS[:2]:
            for number in range(2):
                name = f"{split}/{wordnet_id}/{wordnet_id}_{number}"
                write(root / f"{name}.JPEG", encode(picture(number), "JPEG"))
    return root


def imagenet_s_tree(root: Path, size: int = 50) -> Path:
    """All class folders, and an image of the first and of the last class."""
    tree = root / f"ImageNetS{size}"
    wordnet_ids = [f"n{10_000_000 + 7 * number:08d}" for number in range(size)]
    for split in ("train", "train-semi", "validation", "test"):
        for wordnet_id in wordnet_ids:
            (tree / split / wordnet_id).mkdir(parents=True)
        for number in (1, size):
            folder = wordnet_ids[number - 1]
            stem = f"{folder}/ILSVRC2012_{split}_{number:08d}"
            write(tree / split / f"{stem}.JPEG", encode(picture(number), "JPEG"))
            if split in ("train-semi", "validation"):
                png = tree / f"{split}-segmentation" / f"{stem}.png"
                write(png, annotation(class_values(number)))
    return tree


# ---------------------------------------------------------------- ImageNet


def test_class_folders_are_part_of_the_key_and_no_labels(tmp_path: Path) -> None:
    imagenet_tree(tmp_path)
    listing = list_imagenet(tmp_path, "train")
    items, failed = contents(listing)
    assert failed == {}
    assert list(items) == [f"{name}/{name}_{n}" for name in WORDNET_IDS[:2] for n in range(2)]
    item = items[f"{WORDNET_IDS[0]}/{WORDNET_IDS[0]}_1"]
    assert item.source == f"{WORDNET_IDS[0]}/{WORDNET_IDS[0]}_1.JPEG"
    assert item.read().label is None
    assert item.read().mask is None
    assert listing.classes == ()
    assert listing.roots == (tmp_path / "train",)
    assert list(contents(list_imagenet(tmp_path / "train", ""))[0]) == list(items)


@pytest.mark.parametrize("inside", ["", "train"])
def test_masks_of_the_same_tree(tmp_path: Path, inside: str) -> None:
    imagenet_tree(tmp_path / "data", ("train",))
    name = f"{WORDNET_IDS[1]}/{WORDNET_IDS[1]}_0"
    write(tmp_path / "masks" / inside / f"{name}.png", encode(object_mask(3)))
    items, failed = contents(list_imagenet(tmp_path / "data", "train", tmp_path / "masks"))
    assert list(items) == [name]
    np.testing.assert_array_equal(pixels(items[name].read().mask), object_mask(3))
    assert set(failed.values()) == {"no mask of that stem"}
    assert len(failed) == 3


def test_imagenet_elsewhere(tmp_path: Path) -> None:
    imagenet_tree(tmp_path)
    fsspec.filesystem("memory").put(str(tmp_path), f"/{tmp_path.name}", recursive=True)
    items, failed = contents(list_imagenet(f"memory://{tmp_path.name}", "val"))
    assert failed == {}
    assert len(items) == 4
    assert items[f"{WORDNET_IDS[0]}/{WORDNET_IDS[0]}_1"].read().image.startswith(b"\xff\xd8")


def test_an_unknown_split_lists_what_is_there(tmp_path: Path) -> None:
    imagenet_tree(tmp_path)
    for split in ("test", "..", "../x", "train/"):
        with pytest.raises(InputError, match=r"no folder '.*' \(it has train, val\)"):
            list_imagenet(tmp_path, split)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        list_imagenet(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"nowhere is not a folder; .* --masks"):
        list_imagenet(tmp_path, "val", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        list_imagenet(tmp_path, "empty")


# ---------------------------------------------------------------- ImageNet-S


@pytest.mark.parametrize("split", ["train-semi", "validation"])
def test_annotations_are_labels(tmp_path: Path, split: str) -> None:
    tree = imagenet_s_tree(tmp_path)
    for root in (tmp_path, tree):
        listing = list_imagenet_s(root, 50, split)
        items, failed = contents(listing)
        assert failed == {}
        assert len(items) == 2
        assert listing.classes == ("background", *WORDNET_IDS)
        for number, (key, item) in zip((1, 50), items.items(), strict=True):
            assert key == f"{WORDNET_IDS[number - 1]}/ILSVRC2012_{split}_{number:08d}"
            values = class_values(number)
            label = pickle.loads(pickle.dumps(item)).read().label
            assert label.dtype == np.uint8
            np.testing.assert_array_equal(label, np.where(values == 1000, 255, values))
    assert listing.roots == (tree / split, tree / f"{split}-segmentation")


def test_more_classes_than_8_bits_hold(tmp_path: Path) -> None:
    imagenet_s_tree(tmp_path, 919)
    listing = list_imagenet_s(tmp_path, 919, "validation")
    items, _ = contents(listing)
    assert len(listing.classes) == 920
    values = class_values(919)
    label = list(items.values())[1].read().label
    assert isinstance(label, np.ndarray)
    assert label.dtype == np.uint16
    np.testing.assert_array_equal(label, np.where(values == 1000, 65535, values))
    assert label.shape == (HEIGHT, WIDTH)


def test_splits_without_public_annotations(tmp_path: Path) -> None:
    tree = imagenet_s_tree(tmp_path)
    for split in ("train", "test"):
        listing = list_imagenet_s(tmp_path, 50, split)
        items, _ = contents(listing)
        assert [item.read().label for item in items.values()] == [None, None]
        assert listing.classes == ()
    name = f"{WORDNET_IDS[0]}/ILSVRC2012_train_00000001"
    write(tmp_path / "masks" / "train" / f"{name}.png", encode(object_mask(1)))
    items, failed = contents(list_imagenet_s(tmp_path, 50, "train", tmp_path / "masks"))
    assert list(items) == [name]
    np.testing.assert_array_equal(pixels(items[name].read().mask), object_mask(1))
    assert len(failed) == 1
    without = list_imagenet_s(tmp_path, 50, "validation", labels=False)
    assert [item.read().label for item in contents(without)[0].values()] == [None, None]
    (tree / "validation-segmentation").rename(tree / "gone")
    with pytest.raises(InputError, match=r"validation-segmentation is missing; .*--no-labels"):
        list_imagenet_s(tmp_path, 50, "validation")


def test_class_names_from_a_file(tmp_path: Path) -> None:
    imagenet_s_tree(tmp_path)
    released = write(tmp_path / "im50.txt", "\n".join(reversed(WORDNET_IDS)).encode())
    listing = list_imagenet_s(tmp_path, 50, "validation", categories=released)
    assert listing.classes == ("background", *WORDNET_IDS)  # ids are numbered in sorted order
    own = [f"{50 - number} things" for number in range(50)]
    names = write(tmp_path / "names.txt", "\n".join(own).encode())
    listing = list_imagenet_s(tmp_path, 50, "validation", categories=names)
    assert listing.classes == ("background", *own)
    names.write_text("a\nb\n")
    with pytest.raises(InputError, match=r"names\.txt has 2 classes instead of 50"):
        list_imagenet_s(tmp_path, 50, "validation", categories=names)
    (tmp_path / "ImageNetS50" / "validation" / WORDNET_IDS[3]).rmdir()
    with pytest.raises(InputError, match=r"has 49 classes instead of 50; give --categories"):
        list_imagenet_s(tmp_path, 50, "validation")
    with pytest.raises(InputError, match="--size is 51"):
        list_imagenet_s(tmp_path, 51, "validation")


def test_what_is_no_annotation_is_refused() -> None:
    with pytest.raises(SampleError, match=r"has class 51, but there are only classes 0…50"):
        decode_annotation(annotation(class_values(51)), 51)
    with pytest.raises(SampleError, match=r"has class 306, but"):  # 50 if green were forgotten
        decode_annotation(annotation(class_values(306)), 51)
    with pytest.raises(SampleError, match="is L; ImageNet-S says the class in red and green"):
        decode_annotation(encode(object_mask()), 51)
    with pytest.raises(SampleError, match="label: "):
        decode_annotation(b"nothing", 51)
