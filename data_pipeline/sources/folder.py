"""A folder of images and a folder of masks (and of labels), matched by path and stem."""

import os
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.sources.item import Failure, FileItem, Listing, unique_keys

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MASK_SUFFIXES = IMAGE_SUFFIXES | {".gif"}


def list_folder(
    images: Path,
    masks: Path | None,
    labels: Path | None = None,
    classes: tuple[str, ...] = (),
) -> Listing:
    """Lists every image below `images` with the mask and label of the same relative stem.

    Args:
        images: folder searched recursively; hidden files are passed over.
        masks: folder of the same tree; an image without a mask is a failure. `None`: no masks.
        labels: folder of the same tree; an image without a label is a failure. `None`: no labels.
        classes: names of the label classes, background first.

    Raises:
        InputError: a folder is missing or holds no image.
    """
    image_files = files_by_stem(images, IMAGE_SUFFIXES)
    if not image_files:
        raise InputError(
            f"{images} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); "
            "give --images the folder that the pictures are in"
        )
    mask_files = None if masks is None else files_by_stem(masks, MASK_SUFFIXES)
    label_files = None if labels is None else files_by_stem(labels, MASK_SUFFIXES)
    items, failures = [], []
    for stem, paths in image_files.items():
        found, missing = _partners(stem, mask=mask_files, label=label_files)
        for path in paths:
            source = str(path.relative_to(images))
            if missing:
                failures.append(Failure(stem, source, "match", missing))
            else:
                items.append(FileItem(stem, source, path, found["mask"], found["label"]))
    for name, other in (("mask", mask_files), ("label", label_files)):
        failures += [
            Failure(stem, str(path), "match", f"{name} without an image")
            for stem, paths in (other or {}).items()
            if stem not in image_files
            for path in paths
        ]
    unique, duplicates = unique_keys(items)
    return Listing(unique, [*failures, *duplicates], classes, {"source": "folder"})


def files_by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, list[Path]]:
    """Relative path without suffix -> files, sorted, for every file below `folder`.

    Raises:
        InputError: the folder is missing or cannot be listed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; check the path")
    found: dict[str, list[Path]] = {}

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be listed ({error.strerror}); mend its rights")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in suffixes and not name.startswith("."):
                stem = path.relative_to(folder).with_suffix("").as_posix()
                found.setdefault(stem, []).append(path)
    return dict(sorted(found.items()))


def _partners(
    stem: str, **files: dict[str, list[Path]] | None
) -> tuple[dict[str, Path | None], str]:
    """The one mask and label of a stem, or a sentence on what is missing or ambiguous."""
    found: dict[str, Path | None] = {}
    for name, by_stem in files.items():
        paths = [] if by_stem is None else by_stem.get(stem, [])
        if by_stem is not None and len(paths) != 1:
            names = ", ".join(path.name for path in paths)
            return found, f"no {name} of that stem" if not paths else f"several {name}s: {names}"
        found[name] = paths[0] if paths else None
    return found, ""
