"""ImageNet-S (Gao et al., 2021): `ROOT/ImageNetS50/{train,validation,…}/n01443537/*.JPEG`.

Annotations of `train-semi` and `validation` are in `SPLIT-segmentation/n01443537/*.png`, where the
colours of a pixel say its class: red + 256·green, 0 for other categories, 1000 for ignored parts.
Class i is the i-th of the sorted WordNet ids. Those of `test` are not public, `train` has none.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sample import IGNORE, IGNORE_16_BIT, RawSample, Values, open_image
from data_pipeline.sources.folder import check_pictures
from data_pipeline.sources.imagenet import mask_folder, split_folder
from data_pipeline.sources.item import Failure, FilesOfItem, Listing
from data_pipeline.sources.match_trees import match_trees
from data_pipeline.sources.name_list import read_names

SIZES = (50, 300, 919)
ANNOTATED = ("train-semi", "validation")
IGNORED_PART = 1000
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ImageNetSItem(FilesOfItem):
    """One image of ImageNet-S with its annotation.

    Attributes:
        files: its image, mask, and annotation as the label.
        num_classes: of the data set, `other` included.
    """

    num_classes: int

    def read(self) -> RawSample:
        raw = self.files.read()
        if not isinstance(raw.label, bytes):
            return raw
        return RawSample(raw.image, raw.mask, decode_annotation(raw.label, self.num_classes))


def list_imagenet_s(
    root: Path,
    size: int = 50,
    split: str = "train",
    masks: Path | None = None,
    labels: bool = True,
    categories: Path | None = None,
) -> Listing:
    """Lists one split of ImageNet-S.

    Args:
        root: the folder that holds `ImageNetS50` or its like, or that folder itself.
        size: number of classes: 50, 300 or 919.
        split: train, train-semi, validation, test, or another sub-folder.
        masks: tree of masks with the same class folders, with or without a sub-folder for the
            split. `None` takes none.
        labels: whether annotations become labels, in the splits that have them.
        categories: the release's list of categories, or a name for each class in the order of the
            sorted WordNet ids. `None`: these ids, from the split's folders.

    Raises:
        InputError: a folder or file is missing, or the classes are not as many as `size`.
    """
    if size not in SIZES:
        raise InputError(f"--size is {size}; ImageNet-S has 50, 300 and 919 classes")
    tree = root / f"ImageNetS{size}"
    tree = tree if tree.is_dir() else root
    images = Path(split_folder(tree, split))
    check_pictures(images, "--root")
    annotations = None
    classes: tuple[str, ...] = ()
    if labels and split in ANNOTATED:
        annotations = tree / f"{split}-segmentation"
        if not annotations.is_dir():
            raise InputError(
                f"{annotations} is missing; unpack the annotations of the release there, or build "
                "without labels: --no-labels"
            )
        classes = ("background", *_class_names(images, size, categories))
    mask_tree = None if masks is None else Path(mask_folder(masks, split))
    description = {
        "source": "imagenet_s",
        "root": str(root),
        "size": size,
        "split": split,
        "masks": str(masks or ""),
        "labels": str(annotations or ""),
    }
    roots = tuple(folder for folder in (images, mask_tree, annotations) if folder is not None)
    entries = _entries(images, mask_tree, annotations, 1 + size)
    return Listing(entries, classes, description, roots)


def decode_annotation(data: bytes, num_classes: int) -> Values:
    """Class indices [H, W] of an annotation; uint8 with 255 ignored, or uint16 with 65535.

    Raises:
        SampleError: it is no annotation of that many classes.
    """
    image = open_image(data, "label", ("PNG",))
    if image.mode not in ("RGB", "RGBA"):
        reason = f"is {image.mode}; ImageNet-S says the class in red and green of an RGB image"
        raise SampleError("label", reason)
    colours = np.asarray(image)
    values = colours[..., 0].astype(np.uint16) + (colours[..., 1].astype(np.uint16) << 8)
    ignored = values == IGNORED_PART
    wrong = values[~ignored & (values >= num_classes)]
    if len(wrong):
        reason = f"has class {wrong.min()}, but there are only classes 0…{num_classes - 1}"
        raise SampleError("label", reason)
    if num_classes <= IGNORE:
        return np.where(ignored, IGNORE, values).astype(np.uint8)
    return np.where(ignored, np.uint16(IGNORE_16_BIT), values)


def _entries(
    images: Path, masks: Path | None, annotations: Path | None, num_classes: int
) -> Iterator[ImageNetSItem | Failure]:
    for entry in match_trees(images, masks, annotations):
        yield entry if isinstance(entry, Failure) else ImageNetSItem(entry, num_classes)


def _class_names(images: Path, size: int, names: Path | None) -> list[str]:
    if names is None:
        with os.scandir(images) as entries:
            found = sorted(entry.name for entry in entries if _WORDNET_ID.fullmatch(entry.name))
        where, remedy = images, "give --categories the release's list of categories"
    else:
        found = read_names(names, "one category a line")
        if all(_WORDNET_ID.match(name) for name in found):
            found.sort()  # the release's own lists are in no order, and its ids in this one
        where, remedy = names, "give --categories another file"
    if len(found) != size:
        raise InputError(f"{where} has {len(found)} classes instead of {size}; {remedy}")
    return found
