"""ImageNet's tree, or any folder of class folders: `ROOT/SPLIT/n01440764/*.JPEG`."""

from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.sources.folder import check_pictures
from data_pipeline.sources.item import Listing
from data_pipeline.sources.match_trees import match_trees
from data_pipeline.sources.walk import below, check_folder, is_folder
from data_pipeline.storage import Location, as_location


def list_imagenet(root: Location, split: str = "train", masks: Location | None = None) -> Listing:
    """Lists one split of ImageNet.

    A key is `n01440764/n01440764_18`. Class folders say what an image shows, not where: they make
    no labels, and stay in the source and the key of a sample.

    Args:
        root: the folder, or address, that holds the splits.
        split: train, val or another sub-folder; empty if `root` itself holds the class folders.
        masks: tree of masks with the same class folders, with or without a sub-folder for the
            split. `None` takes none.

    Raises:
        InputError: a folder is missing or holds no image.
    """
    images = split_folder(root, split)
    check_pictures(images, "--root")
    mask_tree = None if masks is None else mask_folder(masks, split)
    description = {
        "source": "imagenet",
        "root": str(root),
        "split": split,
        "masks": str(masks or ""),
    }
    roots = tuple(folder for folder in (images, mask_tree) if isinstance(folder, Path))
    return Listing(match_trees(images, mask_tree, None), (), description, roots)


def split_folder(root: Location, split: str) -> Location:
    """`ROOT/SPLIT`; InputError, with the splits that are there, if that is no folder."""
    root = check_folder(root, "--root")
    if not split:
        return root
    folder = below(root, split)
    if split.strip("./") != split or not is_folder(folder):
        there = "" if not isinstance(root, Path) else f" (it has {_sub_folders(root)})"
        raise InputError(f"{root} has no folder {split!r}{there}; give --split one that it has")
    return folder


def mask_folder(masks: Location, split: str) -> Location:
    """`MASKS/SPLIT` if it is there, otherwise `MASKS`; InputError if neither is a folder."""
    inside = below(as_location(masks), split) if split else masks
    return inside if split and is_folder(inside) else check_folder(masks, "--masks")


def _sub_folders(root: Path) -> str:
    visible = (path for path in root.iterdir() if not path.name.startswith("."))
    names = sorted(path.name for path in visible if path.is_dir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "no folder"
