"""A folder of images and a folder of masks (and of labels), matched by path and stem."""

from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.sources.item import Listing
from data_pipeline.sources.match_trees import IMAGE_SUFFIXES, match_trees, pictures
from data_pipeline.sources.walk import check_folder
from data_pipeline.storage import Location


def list_folder(
    images: Location,
    masks: Location | None = None,
    labels: Location | None = None,
    classes: tuple[str, ...] = (),
) -> Listing:
    """Lists every image below `images` with the mask and label of the same relative stem.

    Args:
        images: folder, or address such as `s3://bucket/images`, searched recursively, through links
            too; hidden files are passed over, and pictures of a kind that is not read are failures.
        masks: folder of the same tree, or of all masks without one; an image without a mask is a
            failure. `None`: no masks.
        labels: the same for labels. `None`: no labels.
        classes: names of the label classes, background first.

    Raises:
        InputError: a folder is missing or holds no image.
    """
    images = check_folder(images, "--images")
    masks = None if masks is None else check_folder(masks, "--masks")
    labels = None if labels is None else check_folder(labels, "--labels")
    check_pictures(images, "--images")
    description = {
        "source": "folder",
        "images": str(images),
        "masks": str(masks or ""),
        "labels": str(labels or ""),
    }
    roots = tuple(folder for folder in (images, masks, labels) if isinstance(folder, Path))
    return Listing(match_trees(images, masks, labels), classes, description, roots)


def check_pictures(folder: Location, option: str) -> None:
    """InputError if there is no picture below a folder; looks no further than the first."""
    if next(pictures(folder), None) is None:
        raise InputError(
            f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); "
            f"give {option} the folder that the pictures are in"
        )
