"""PASCAL VOC trees: the layout of the released MaskContrast archive, and the VOCdevkit's own.

| released | VOCdevkit/VOC2012 |
|---|---|
| `images/KEY.jpg` | `JPEGImages/KEY.jpg` |
| `saliency_{un,}supervised_model/KEY.png` | none: give a folder of masks, or build without |
| `SegmentationClassAug/KEY.png` (trainaug) | the same |
| `SegmentationClass/KEY.png` (all other splits) | the same |
| `sets/SPLIT.txt` | `ImageSets/Segmentation/SPLIT.txt` |

As in the published evaluation: trainaug's labels are mostly those of Hariharan et al. (ICCV 2011),
train and val have PASCAL's own.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.sources.item import Failure, FileItem, Listing, read_class_names
from data_pipeline.sources.name_list import read_names

VOC_CLASSES = (
    "background",
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa"),
    *("train", "tv monitor"),
)
_IMAGES = ("images", "JPEGImages")
_SETS = ("sets", "ImageSets/Segmentation")
_AUGMENTED, _OWN = "SegmentationClassAug", "SegmentationClass"

log = logging.getLogger(__name__)


def list_voc(root: Path, split: str, masks: str | None = None, labels: bool = True) -> Listing:
    """Lists one split of a PASCAL tree.

    Args:
        root: the folder that holds `images/` or `JPEGImages/` (a VOCdevkit's top is accepted).
        split: name of the list: trainaug, train, val, …
        masks: folder of saliency masks, below `root` or a path of its own. `None` takes none.
        labels: whether the labels become part of the shards.

    Raises:
        InputError: the tree, the list, or a folder asked for is missing.
    """
    root = _tree(root)
    images = _first(root, _IMAGES, "images")
    names = _read_list(_first(root, _SETS, "split lists"), split)
    mask_folder = None if masks is None else _mask_folder(root, masks)
    label_folder = _label_folder(root, split) if labels else None
    description = {
        "source": "voc",
        "root": str(root),
        "split": split,
        "masks": masks or "",
        "labels": label_folder.name if label_folder else "",
    }
    classes = _classes(root) if labels else ()
    roots = tuple(folder for folder in (images, mask_folder, label_folder) if folder is not None)
    return Listing(_entries(names, images, mask_folder, label_folder), classes, description, roots)


def _entries(
    names: list[str], images: Path, masks: Path | None, labels: Path | None
) -> Iterator[FileItem | Failure]:
    for name in dict.fromkeys(names):  # a name that is listed twice is still one sample
        image = images / f"{name}.jpg"
        mask = None if masks is None else masks / f"{name}.png"
        label = None if labels is None else labels / f"{name}.png"
        wanted = {"image": image, "mask": mask, "label": label}
        missing = [kind for kind, path in wanted.items() if path and not path.is_file()]
        source = f"{images.name}/{name}.jpg"
        if missing:
            reason = f"no {missing[0]}: {wanted[missing[0]]} is missing"
            yield Failure(name, source, "match", reason)
        else:
            yield FileItem(name, source, image, mask, label)


def _tree(root: Path) -> Path:
    for candidate in (root, *sorted(root.glob("VOC20*")), *sorted(root.glob("VOCdevkit/VOC20*"))):
        if any((candidate / name).is_dir() for name in _IMAGES):
            return candidate
    raise InputError(
        f"{root} is no PASCAL tree: it has neither images/ nor JPEGImages/; "
        "give --root the folder that holds one of them"
    )


def _first(root: Path, names: tuple[str, ...], what: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    hint = "; --no-labels builds without them" if what == "labels" else ""
    raise InputError(f"{root} has no folder of {what}: looked for {', '.join(names)}{hint}")


def _label_folder(root: Path, split: str) -> Path:
    """The folder of a split's labels, or the other one, with a warning, where that is missing."""
    names = (_AUGMENTED, _OWN) if split == "trainaug" else (_OWN, _AUGMENTED)
    folder = _first(root, names, "labels")
    if folder.name != names[0]:
        log.warning(
            "%s has no %s, where the published labels of %s are: they are taken from %s, and "
            "figures on them are not comparable with published ones",
            *(root, names[0], split, folder.name),
        )
    return folder


def _mask_folder(root: Path, masks: str) -> Path:
    for folder in (root / masks, Path(masks)):
        if folder.is_dir():
            return folder
    present = sorted(path.name for path in root.iterdir() if path.is_dir())
    raise InputError(
        f"no folder of masks {masks!r} below {root} (it has {', '.join(present)}); "
        "give --masks one of these, or a path"
    )


def _read_list(folder: Path, split: str) -> list[str]:
    file = folder / f"{split}.txt"
    if "/" in split or not file.is_file():
        present = ", ".join(sorted(path.stem for path in folder.glob("*.txt"))) or "none is there"
        raise InputError(f"no split {split!r} in {folder}; --split can be one of: {present}")
    names = [line.split()[0] for line in read_names(file, "one image name a line")]
    wrong = [name for name in names if "/" in name or "\\" in name or name.startswith(".")]
    if wrong:
        raise InputError(
            f"{file} names {wrong[0]!r}; expected one plain image name a line, as 2007_000032"
        )
    return names


def _classes(root: Path) -> tuple[str, ...]:
    file = root / "classes.txt"
    return read_class_names(file) if file.is_file() else VOC_CLASSES
