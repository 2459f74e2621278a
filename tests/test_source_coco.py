"""COCO's tree: where things are, how instances are drawn, which label a pixel gets."""

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sources import json_stream
from data_pipeline.sources.coco import list_coco
from data_pipeline.sources.coco_classes import (
    CLASSES,
    SUPER_CATEGORIES,
    THINGS,
    names_27,
    names_81,
    table_27,
    table_81,
)
from data_pipeline.sources.coco_instances import draw_classes, draw_proposals, draw_regions
from data_pipeline.sources.json_stream import stream_lists
from tests.sample_data import HEIGHT, WIDTH, encode, object_mask, picture, write
from tests.source_data import contents, pixels

SPLIT = "val2017"
PERSON, DOG, TOOTHBRUSH = 1, 18, 90  # category ids


def rectangle(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def annotation(image: int, category: int, segmentation: Any, crowd: int = 0) -> dict[str, Any]:
    return {
        "id": 100 + image,
        "image_id": image,
        "category_id": category,
        "iscrowd": crowd,
        "segmentation": segmentation,
        "area": 1.5,
        "bbox": [0, 0, 1, 1],
    }


def coco_tree(
    root: Path,
    annotations: list[dict[str, Any]],
    numbers: tuple[int, ...] = (139, 285),
    images: str = SPLIT,
) -> Path:
    """The layout of the 2017 release, without pixel maps."""
    for number in numbers:
        write(root / images / f"{number:012d}.jpg", encode(picture(number), "JPEG"))
    entries = [
        {"id": number, "file_name": f"{number:012d}.jpg", "height": HEIGHT, "width": WIDTH}
        for number in numbers
    ]
    value = {
        "info": {"year": 2017, "contributor": '{["}'},
        "licenses": [{"id": 1}],
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}],
    }
    path = root / "annotations" / f"instances_{SPLIT}.json"
    write(path, json.dumps(value, indent=1).encode())
    return root


def add_pixel_maps(root: Path, folder: str) -> NDArray[np.uint8]:
    """A map with every value that occurs and some unlabelled pixels."""
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 182
    values[0] = 255
    for path in sorted(root.glob(f"**/{SPLIT}/*.jpg")):
        write(root / folder / f"{path.stem}.png", encode(values))
    return values


# ---------------------------------------------------------------- the tree


def test_instances_are_masks_and_labels(tmp_path: Path) -> None:
    annotations = [
        annotation(139, DOG, [rectangle(2, 3, 12, 13)]),
        annotation(285, PERSON, [rectangle(0, 0, 5, 5)]),
        annotation(139, PERSON, [rectangle(8, 3, 10, 5), rectangle(20, 15, 24, 18)]),
    ]
    listing = list_coco(coco_tree(tmp_path, annotations), SPLIT)
    items, failed = contents(listing)
    assert failed == {}
    assert list(items) == ["000000000139", "000000000285"]
    item = pickle.loads(pickle.dumps(items["000000000139"]))
    assert item.source == "val2017/000000000139.jpg"
    assert item.sizes()[0] == (tmp_path / SPLIT / "000000000139.jpg").stat().st_size
    raw = item.read()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:13, 2:12] = 1  # the largest
    mask[3:5, 8:10] = 2  # on top of it
    mask[15:18, 20:24] = 2
    np.testing.assert_array_equal(raw.mask, mask)
    names = names_81()
    label = np.select([mask == 1, mask == 2], [names.index("dog"), names.index("person")])
    np.testing.assert_array_equal(raw.label, label)
    assert listing.classes == names
    assert listing.roots == (tmp_path / SPLIT,)
    large, _ = contents(list_coco(tmp_path, SPLIT, instance_area=0.1))
    mask = large["000000000139"].read().mask
    assert isinstance(mask, np.ndarray)
    assert mask.max() == 1


@pytest.mark.parametrize("labels", ["27", "81"])
@pytest.mark.parametrize(
    "folder",
    [
        f"stuffthingmaps/{SPLIT}",
        f"stuffthingmaps_trainval2017/{SPLIT}",
        f"annotations/stuffthingmaps/{SPLIT}",
        f"annotations/{SPLIT}",
        SPLIT,
    ],
)
def test_labels_come_from_pixel_maps(tmp_path: Path, folder: str, labels: str) -> None:
    coco_tree(tmp_path, [], images=f"images/{SPLIT}" if folder == f"annotations/{SPLIT}" else SPLIT)
    values = add_pixel_maps(tmp_path, folder)
    listing = list_coco(tmp_path, SPLIT, masks=None, labels=labels)
    items, failed = contents(listing)
    assert failed == {}
    names = listing.classes
    assert len(names) == {"27": 28, "81": 81}[labels]
    label = items["000000000139"].read().label
    assert isinstance(label, np.ndarray)
    assert (label[0] == 255).all()
    super_category = {
        int(member.split(" ")[0]): name
        for name, members in SUPER_CATEGORIES.items()
        for member in members.split(", ")
    }
    for value, found in zip(values[1:].flat, label[1:].flat, strict=True):
        number = int(value) + 1
        if labels == "27":
            assert names[found] == super_category[number]
        elif number in THINGS:
            assert names[found] == CLASSES[number]
        else:
            assert found == (0 if number >= 92 else 255)


def test_pixel_maps_are_checked(tmp_path: Path) -> None:
    coco_tree(tmp_path, [])
    maps = tmp_path / "stuffthingmaps" / SPLIT
    add_pixel_maps(tmp_path, f"stuffthingmaps/{SPLIT}")
    write(maps / "000000000139.png", encode(picture()))
    (maps / "000000000285.png").unlink()
    items, failed = contents(list_coco(tmp_path, SPLIT))
    with pytest.raises(SampleError, match="is RGB; COCO-Stuff's pixel maps have one"):
        items["000000000139"].read()
    reason = f"no label: {maps / '000000000285.png'} is missing"
    assert failed == {"val2017/000000000285.jpg": reason}


def test_masks_from_a_folder_need_no_annotations(tmp_path: Path) -> None:
    coco_tree(tmp_path, [])
    (tmp_path / "annotations" / f"instances_{SPLIT}.json").unlink()
    for folder in (f"saliency/{SPLIT}", "flat"):
        write(tmp_path / folder / "000000000139.png", encode(object_mask(1)))
        listing = list_coco(tmp_path, SPLIT, folder.partition("/")[0], "none")
        items, failed = contents(listing)
        assert list(items) == ["000000000139"]
        np.testing.assert_array_equal(pixels(items["000000000139"].read().mask), object_mask(1))
        assert items["000000000139"].read().label is None
        assert "is missing" in failed["val2017/000000000285.jpg"]
        assert listing.classes == ()
    elsewhere, _ = contents(list_coco(tmp_path, SPLIT, str(tmp_path / "flat"), "none"))
    assert list(elsewhere) == ["000000000139"]


def test_only_the_images_of_a_list(tmp_path: Path) -> None:
    coco_tree(tmp_path, [], numbers=(1, 2, 3, 4, 5))
    names = "1\n000000000003\n  val2017/000000000005.jpg\n3\n\n77\n"
    curated = write(tmp_path / "curated.txt", names.encode())
    listing = list_coco(tmp_path, SPLIT, names=curated)
    items, failed = contents(listing)
    assert list(items) == ["000000000001", "000000000003", "000000000005"]
    assert list(failed) == ["val2017/000000000077.jpg"]
    assert listing.description["list"] == str(curated)


def test_images_and_annotations_that_miss_each_other(tmp_path: Path) -> None:
    coco_tree(tmp_path, [])
    (tmp_path / SPLIT / "000000000139.jpg").rename(tmp_path / SPLIT / "000000000777.jpg")
    items, failed = contents(list_coco(tmp_path, SPLIT))
    assert list(items) == ["000000000285"]
    assert failed == {
        "val2017/000000000139.jpg": (
            f"no image: {tmp_path / SPLIT / '000000000139.jpg'} is missing"
        ),
        "val2017/000000000777.jpg": "instances_val2017.json does not list it",
    }


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no images for --split 'val2017': neither .* holds"):
        list_coco(tmp_path, SPLIT)
    coco_tree(tmp_path, [])
    for split in ("", ".", "..", "train2017"):
        with pytest.raises(InputError, match="no images for --split"):
            list_coco(tmp_path, split)
    with pytest.raises(InputError, match="no pixel maps of COCO-Stuff for --labels 27"):
        list_coco(tmp_path, SPLIT, labels="27")
    with pytest.raises(InputError, match="--labels is '82'; it can be 27, 81, none"):
        list_coco(tmp_path, SPLIT, labels="82")
    with pytest.raises(InputError, match="--instance-area is 1"):
        list_coco(tmp_path, SPLIT, instance_area=1)
    with pytest.raises(InputError, match="no folder of masks 'saliency'"):
        list_coco(tmp_path, SPLIT, "saliency")
    annotations = tmp_path / "annotations" / f"instances_{SPLIT}.json"
    whole = annotations.read_bytes()
    annotations.write_bytes(whole[:-200])
    with pytest.raises(InputError, match=r"instances_val2017\.json is damaged: expected"):
        list(list_coco(tmp_path, SPLIT).entries)
    annotations.write_bytes(whole.replace(b'"height"', b'"hoehe"'))
    with pytest.raises(InputError, match="one of its images is not as COCO has them"):
        list(list_coco(tmp_path, SPLIT).entries)
    annotations.unlink()
    with pytest.raises(InputError, match=r"instances_val2017\.json is missing; --root"):
        list_coco(tmp_path, SPLIT)


# ---------------------------------------------------------------- classes


def test_the_182_classes() -> None:
    assert sorted(CLASSES) == list(range(1, 183))
    assert len(set(CLASSES.values())) == 182
    assert len(THINGS) == 80
    assert names_81()[:3] == ("background", "person", "bicycle")
    assert names_81()[-1] == "toothbrush"
    assert len(names_81()) == 81
    assert names_27()[1] == "electronic"
    assert names_27()[13:15] == ("ceiling", "floor")
    assert names_27()[-1] == "water"
    assert len(names_27()) == 28
    counts = np.bincount(table_27()[:182], minlength=28)
    expected = [0, 6, 6, 10, 10, 8, 8, 8, 10, 6, 1, 10, 8]  # 91 things
    expected += [2, 6, 4, 11, 4, 11, 7, 2, 6, 11, 9, 2, 6, 5, 5]  # 91 stuff
    assert counts.tolist() == expected
    assert (table_27()[182:] == 255).all()
    assert (table_81()[91:182] == 0).all()
    assert (table_81()[182:] == 255).all()


# ---------------------------------------------------------------- pixels


def test_pixels_whose_centre_is_inside_a_polygon() -> None:
    (region,) = draw_regions([annotation(1, PERSON, [rectangle(1.4, 1.6, 3.6, 3.4)])], 5, 6)
    assert (region.top, region.left, region.area) == (1, 1, 3)
    np.testing.assert_array_equal(draw_proposals([region], 5, 6)[2], [0, 1, 1, 1, 0, 0])
    triangle = [0, 0, 6, 0, 0, 6]
    mask = draw_proposals(draw_regions([annotation(1, PERSON, [triangle])], 6, 6), 6, 6)
    np.testing.assert_array_equal(mask, np.flipud(np.tri(6, k=-1, dtype=np.uint8)))
    beyond = [-10, -10, 100, -10, 100, 2, -10, 2]
    mask = draw_proposals(draw_regions([annotation(1, PERSON, [beyond])], 4, 5), 4, 5)
    np.testing.assert_array_equal(mask, np.repeat([[1], [1], [0], [0]], 5, 1))


def test_run_length_codes() -> None:
    expected = np.zeros((4, 5), np.uint8)
    expected[1:3, 1] = 1
    expected[0, 3:] = 1
    counts = [5, 2, 5, 1, 3, 1, 3]  # column by column
    for form in (counts, "525ON00"):
        regions = draw_regions([annotation(1, DOG, {"size": [4, 5], "counts": form})], 4, 5)
        np.testing.assert_array_equal(draw_proposals(regions, 4, 5), expected)
        assert regions[0].area == 4


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [4, 5], "counts": [5, 2]},
        {"size": [4, 5], "counts": [-5, 25]},
        {"size": [4, 5], "counts": "e0"},
        {"size": [4, 5], "counts": "ooooooooooooo"},
        {"size": [4, 5], "counts": " "},
        {"size": [5, 4], "counts": [20]},
        {"counts": [20]},
        {"size": [4, 5], "counts": None},
        [[0, 0, 1]],
        [[0, 0, 1, float("nan"), 1, 1]],
        [[0, 0, 1e300, 0, 1, 1]],
        [["a", 0, 1, 0, 1, 1]],
        None,
        7,
    ],
)
def test_damaged_segmentations_are_failures(segmentation: Any) -> None:
    with pytest.raises(SampleError, match="annotation 101 is damaged") as caught:
        draw_regions([annotation(1, DOG, segmentation)], 4, 5)
    assert caught.value.stage == "mask"


def test_smaller_instances_lie_on_top_and_crowds_below() -> None:
    annotations = [
        annotation(1, DOG, [rectangle(4, 0, 6, 2)]),
        annotation(1, PERSON, {"size": [4, 8], "counts": [0, 32]}, crowd=1),
        annotation(1, PERSON, [rectangle(2, 0, 6, 4)]),
        annotation(1, TOOTHBRUSH, [[]]),
    ]
    regions = draw_regions(annotations, 4, 8)
    mask = draw_proposals(regions, 4, 8)
    np.testing.assert_array_equal(mask[0], [255, 255, 1, 1, 2, 2, 255, 255])
    np.testing.assert_array_equal(mask[3], [255, 255, 1, 1, 1, 1, 255, 255])
    label = draw_classes(regions, 4, 8, {PERSON: 3, DOG: 5, TOOTHBRUSH: 6})
    np.testing.assert_array_equal(label[0], [3, 3, 3, 3, 5, 5, 3, 3])
    small_crowd = annotation(1, TOOTHBRUSH, [rectangle(0, 0, 3, 1)], crowd=1)
    regions = draw_regions([small_crowd, annotations[2]], 4, 8)
    np.testing.assert_array_equal(draw_proposals(regions, 4, 8)[0], [255, 255, 1, 1, 1, 1, 0, 0])
    label = draw_classes(regions, 4, 8, {PERSON: 3, DOG: 5, TOOTHBRUSH: 6})
    np.testing.assert_array_equal(label[0], [6, 6, 3, 3, 3, 3, 0, 0])
    regions = draw_regions(annotations, 4, 8)
    few = draw_proposals(regions, 4, 8, min_area=0.2)
    assert set(np.unique(few)) == {1, 255}
    with pytest.raises(SampleError, match="has category 1, which is none of COCO's"):
        draw_classes(regions, 4, 8, {DOG: 5, TOOTHBRUSH: 6})


def test_of_more_than_254_instances_the_largest_are_drawn() -> None:
    annotations = [
        annotation(1, DOG, [rectangle(2 * column, 2 * row, 2 * column + 1, 2 * row + 1)])
        for row in range(20)
        for column in range(20)
    ]
    annotations.append(annotation(1, DOG, [rectangle(50, 0, 60, 10)]))
    mask = draw_proposals(draw_regions(annotations, 40, 60), 40, 60)
    assert set(np.unique(mask)) == set(range(255))
    assert (mask[:10, 50:] == 1).all()


def test_absurd_sizes_are_failures() -> None:
    for height, width in ((0, 5), (100_000, 100_000)):
        with pytest.raises(SampleError, match="is no size of an image"):
            draw_regions([], height, width)
    with pytest.raises(SampleError, match="has 10,001 instances"):
        draw_regions([annotation(1, DOG, [])] * 10_001, 4, 4)


# ---------------------------------------------------------------- large JSON


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_lists_are_streamed(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)  # as if the file were as much larger
    value = {
        "info": {"a": [1, {"b": "]}"}]},
        "images": [{"id": n, "name": "x" * n} for n in range(50)],
        "empty": [],
        "numbers": [1, 1234567, -2.5e-3, "ä\U0001f600", None, [3]],
        "last": 12,
    }
    for indent in (None, 2):
        path = write(tmp_path / "a.json", json.dumps(value, indent=indent).encode())
        lists: dict[str, list[Any]] = {}
        for name, element in stream_lists(path):
            lists.setdefault(name, []).append(element)
        assert lists == {"images": value["images"], "numbers": value["numbers"]}
    assert list(stream_lists(write(tmp_path / "a.json", b" {} "))) == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a"', '{"a": [1', '{"a": [1,]}', '{"a": [1 2]}', "{1: 2}", '{"a": [}']
)
def test_what_is_no_json_object_says_where(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.json", text.encode())
    with pytest.raises(InputError, match=r"a\.json is damaged: expected .* at character"):
        list(stream_lists(path))


def test_deep_nesting_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'{"a": ' + b"[" * 100_000)
    with pytest.raises(InputError, match="is damaged"):
        list(stream_lists(path))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_of_the_annotations(tmp_path: Path) -> None:
    peaks = []
    for count in (6_000, 15_000):
        element = json.dumps(annotation(1, DOG, [rectangle(1, 2, 3, 4)] * 10))
        text = '{"annotations": [' + ",\n".join([element] * count) + "]}"
        path = write(tmp_path / "a.json", text.encode())
        del text
        tracemalloc.start()
        assert sum(1 for _ in stream_lists(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000
