"""Small trees in the layouts of whole data sets, whose every pixel is known.

Every image has one object of a class, 96 of its 600 pixels, and 30 that are ignored.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.sample_data import HEIGHT, WIDTH, encode, palette_png, picture, write

OBJECT, IGNORED = 96, 30
BACKGROUND = HEIGHT * WIDTH - OBJECT - IGNORED
IDS = {50: [f"n{10_000_000 + 7 * number:08d}" for number in range(50)]}
PEOPLE, DOGS, SKIES, TREES = 0, 17, 156, 168  # values of COCO-Stuff's pixel maps


def block(inside: int, outside: int, ignored: int) -> NDArray[np.int64]:
    """A label [20, 30]: eight rows and twelve columns of an object, the last row ignored."""
    label = np.full((HEIGHT, WIDTH), outside)
    label[4:12, 5:17] = inside
    label[-1] = ignored
    return label


def png(label: NDArray[np.int64]) -> bytes:
    return encode(label.astype(np.uint8))


def jpeg(number: int) -> bytes:
    return encode(picture(number), "JPEG")


VOC_IMAGES = {"2007_000032": 1, "2007_000061": 4, "2008_000001": 20}


def voc_archive(root: Path) -> Path:
    """The released archive: palette labels, 255 ignored, and masks of the upper half of objects."""
    return _voc(root, "images", "SegmentationClass", "sets")


def voc_devkit(root: Path) -> Path:
    _voc(root / "VOCdevkit/VOC2012", "JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
    return root


def _voc(root: Path, images: str, labels: str, sets: str) -> Path:
    for number, (name, label_class) in enumerate(VOC_IMAGES.items()):
        label = block(label_class, 0, 255)
        write(root / images / f"{name}.jpg", jpeg(number))
        write(root / labels / f"{name}.png", palette_png(label.astype(np.uint8)))
        mask = 255 * (label == label_class)
        mask[8:] = 0
        write(root / "saliency" / f"{name}.png", png(mask))
    write(root / sets / "val.txt", "\n".join(VOC_IMAGES).encode())
    return root


def coco(root: Path) -> Path:
    """Two images of the curated list, one beside it; pixel maps and instances.

    And two to learn on, with pixel maps alone.
    """
    entries = []
    for number, split, inside, outside in (
        (139, "val2017", PEOPLE, SKIES),
        (285, "val2017", DOGS, TREES),
        (632, "val2017", PEOPLE, TREES),
        (9, "train2017", PEOPLE, TREES),
        (25, "train2017", DOGS, SKIES),
    ):
        name = f"{number:012d}"
        write(root / split / f"{name}.jpg", jpeg(number))
        maps = root / "stuffthingmaps" / split / f"{name}.png"
        write(maps, png(block(inside, outside, 255)))
        if split == "train2017":
            continue
        size = {"height": HEIGHT, "width": WIDTH}
        entries.append({"id": number, "file_name": f"{name}.jpg", **size})
    value = {"images": entries, "annotations": [], "categories": []}
    write(root / "annotations/instances_val2017.json", json.dumps(value).encode())
    write(root / "curated.txt", b"000000000139\n285\n")
    return root


def coco_instances(root: Path) -> Path:
    """The same objects as polygons, without pixel maps."""
    coco(root)
    shutil.rmtree(root / "stuffthingmaps")
    path = root / "annotations/instances_val2017.json"
    value = json.loads(path.read_bytes())
    corners = [5, 4, 17, 4, 17, 12, 5, 12]
    for number, (image, category) in enumerate({139: 1, 285: 18, 632: 1}.items()):
        about = {"id": number, "image_id": image, "category_id": category, "iscrowd": 0}
        value["annotations"].append({**about, "segmentation": [corners]})
    path.write_text(json.dumps(value))
    return root


def imagenet_s(size: int, folders: list[str], classes: list[int], root: Path) -> Path:
    tree = root / f"ImageNetS{size}"
    for folder in folders:
        (tree / "validation" / folder).mkdir(parents=True)
    for number, label_class in enumerate(classes):
        folder = folders[label_class - 1] if size == 50 else folders[number]
        stem = f"{folder}/ILSVRC2012_val_{number:08d}"
        write(tree / "validation" / f"{stem}.JPEG", jpeg(number))
        values = block(label_class, 0, 1000)
        colours = np.stack([values % 256, values // 256, 0 * values], -1).astype(np.uint8)
        write(tree / "validation-segmentation" / f"{stem}.png", encode(colours))
    return root


def imagenet_s_50(root: Path) -> Path:
    return imagenet_s(50, IDS[50], [1, 7, 50], root)


def imagenet_s_300(root: Path) -> Path:
    """Classes that 8 bits do not hold; two folders, and the names of all from a list."""
    write(root / "names.txt", "\n".join(f"kind {n}" for n in range(1, 301)).encode())
    return imagenet_s(300, ["n01440764", "n15075141"], [44, 300], root)


def davis(root: Path) -> Path:
    """The release of 2016: frames, grey annotations of 0 and 255, and lists of pairs."""
    lines = []
    for sequence, frames in {"cows": 2, "goat": 1}.items():
        for frame in range(frames):
            path = f"480p/{sequence}/{frame:05d}"
            write(root / "JPEGImages" / f"{path}.jpg", jpeg(frame + 10 * frames))
            write(root / "Annotations" / f"{path}.png", png(block(255, 0, 0)))
            lines.append(f"/JPEGImages/{path}.jpg /Annotations/{path}.png \n")
    write(root / "ImageSets/480p/val.txt", "".join(lines).encode())
    return root
