"""A folder of images and a folder of masks (and of labels), matched by path and stem."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.sources.item import Failure, FileItem, Listing, unique_keys

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"}
)
MASK_SUFFIXES = IMAGE_SUFFIXES | {".gif"}
OTHER_PICTURES = frozenset(  # not read, but not passed over in silence either
    {".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".pgm", ".ppm", ".dng", ".cr2", ".nef"}
)


def list_folder(
    images: Path,
    masks: Path | None,
    labels: Path | None = None,
    classes: tuple[str, ...] = (),
) -> Listing:
    """Lists every image below `images` with the mask and label of the same relative stem.

    Args:
        images: folder searched recursively, through links too; hidden files are passed over, and
            pictures of a kind that is not read are failures.
        masks: folder of the same tree; an image without a mask is a failure. `None`: no masks.
        labels: folder of the same tree; an image without a label is a failure. `None`: no labels.
        classes: names of the label classes, background first.

    Raises:
        InputError: a folder is missing or holds no image.
    """
    pictures = files_by_stem(images, IMAGE_SUFFIXES | OTHER_PICTURES)
    if not pictures:
        raise InputError(
            f"{images} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); "
            "give --images the folder that the pictures are in"
        )
    mask_files = None if masks is None else files_by_stem(masks, MASK_SUFFIXES)
    label_files = None if labels is None else files_by_stem(labels, MASK_SUFFIXES)
    items: list[FileItem] = []
    failures = [
        Failure(stem, str(path.relative_to(images)), "match", f"{path.suffix} is not read")
        for stem, paths in pictures.items()
        for path in paths
        if path.suffix.lower() not in IMAGE_SUFFIXES
    ]
    for stem, paths in pictures.items():
        found, missing = _partners(stem, mask=mask_files, label=label_files)
        for path in paths:
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            source = str(path.relative_to(images))
            if missing:
                failures.append(Failure(stem, source, "match", missing))
            else:
                items.append(FileItem(stem, source, path, found["mask"], found["label"]))
    for name, other in (("mask", mask_files), ("label", label_files)):
        failures += [
            Failure(stem, str(path), "match", f"{name} without an image")
            for stem, paths in (other or {}).items()
            if stem not in pictures
            for path in paths
        ]
    unique, duplicates = unique_keys(items)
    description = {
        "source": "folder",
        "images": str(images),
        "masks": str(masks or ""),
        "labels": str(labels or ""),
    }
    return Listing(unique, [*failures, *duplicates], classes, description)


def files_by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, list[Path]]:
    """Relative path without suffix -> files, sorted, for every file below `folder`.

    Raises:
        InputError: the folder is missing or cannot be listed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; check the path")
    found: dict[str, list[Path]] = {}
    for path in _walk(folder, frozenset()):
        if path.suffix.lower() in suffixes:
            stem = path.relative_to(folder).with_suffix("").as_posix()
            found.setdefault(stem, []).append(path)
    return dict(sorted(found.items()))


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """All files below `folder` that are not hidden, sorted; links are followed, but not in circles.

    A link to nothing is listed, so that it becomes a failure; a pipe or device, which would hang
    or never end, is not.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            visible = sorted(
                (entry for entry in entries if not entry.name.startswith(".")),
                key=lambda entry: entry.name,
            )
        for entry in visible:
            path = folder / entry.name
            if entry.is_dir():
                yield from _walk(path, above | {real})
            elif entry.is_file() or (entry.is_symlink() and not path.exists()):
                yield path
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be listed ({error.strerror}); mend its rights"
        ) from None


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
