"""DAVIS 2016 and 2017: videos whose every frame is annotated.

| what | where |
|---|---|
| frames | `ROOT/JPEGImages/480p/SEQUENCE/00000.jpg` |
| annotations | `ROOT/Annotations/480p/SEQUENCE/00000.png` |
| lists of 2016 | `ROOT/ImageSets/480p/SPLIT.txt`: image and annotation of each frame |
| lists of 2017 | `ROOT/ImageSets/{2016,2017}/SPLIT.txt`: names of sequences |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sample import RawSample, open_image
from data_pipeline.sources.item import Failure, FileItem, FilesOfItem, Listing
from data_pipeline.sources.name_list import read_names

YEARS = (2016, 2017)
ANNOTATIONS = "annotations"
MAX_OBJECTS = 20  # of one sequence


@dataclass(frozen=True)
class DavisItem(FilesOfItem):
    """One frame.

    Attributes:
        files: its image, the file of its mask if that is one, and its annotation as the label.
        year: in 2016 all objects are one.
        as_mask, as_label: what the annotation is taken for.
    """

    year: int
    as_mask: bool
    as_label: bool

    def read(self) -> RawSample:
        raw = self.files.read()
        if not isinstance(raw.label, bytes):
            return raw
        objects = decode_objects(raw.label, self.year)
        mask: Any = objects if self.as_mask else raw.mask
        return RawSample(raw.image, mask, objects if self.as_label else None)


def list_davis(
    root: Path,
    split: str,
    year: int = 2016,
    masks: str | None = ANNOTATIONS,
    labels: bool = True,
    resolution: str = "480p",
) -> Listing:
    """Lists the frames of one split, keys `SEQUENCE/00000`.

    Args:
        root: the folder that holds `JPEGImages` and `Annotations`.
        split: train, val, or another list.
        year: of the task. 2016: foreground and background, also from the annotations of 2017.
            2017: ids of objects, which hold within a sequence only.
        masks: `annotations` takes these; a folder with the same sequences takes its masks; `None`
            takes none.
        labels: whether annotations become labels.
        resolution: folder name of the frames, 480p or Full-Resolution and its like.

    Raises:
        InputError: a folder or list is missing or is none of DAVIS, or an option is wrong.
    """
    if year not in YEARS:
        raise InputError(f"--year is {year}; DAVIS has 2016 and 2017")
    images = _folder(root, "JPEGImages", resolution)
    annotated = labels or masks == ANNOTATIONS
    annotations = _folder(root, "Annotations", resolution) if annotated else None
    mask_folder = None if masks is None or masks == ANNOTATIONS else _mask_folder(root, masks)
    names = _read_list(root, split, year, resolution)
    description = {
        "source": "davis",
        "root": str(root),
        "split": split,
        "year": year,
        "masks": masks or "",
        "labels": labels,
        "resolution": resolution,
    }
    objects = ["object"] if year == 2016 else [f"object {n}" for n in range(1, MAX_OBJECTS + 1)]
    classes = ("background", *objects) if labels else ()
    roots = tuple(folder for folder in (images, mask_folder, annotations) if folder is not None)
    source = _Split(images, mask_folder, annotations, year, masks == ANNOTATIONS, labels)
    return Listing(source.entries(names), classes, description, roots)


def decode_objects(data: bytes, year: int) -> Any:
    """Object ids of an annotation, uint8 [H, W]: 0 and 1 in 2016; in 2017 also 255, ignored.

    Raises:
        SampleError: it is no annotation of DAVIS.
    """
    image = open_image(data, "label", ("PNG",))
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    if values.ndim == 3 and image.mode in ("RGB", "RGBA") and year == 2016:
        values = values[..., :3].max(2)  # black and white, whatever the number of channels
    if values.ndim != 2 or values.dtype != np.uint8:
        raise SampleError("label", f"is {image.mode}; DAVIS has grey or palette annotations")
    return (values > 0).astype(np.uint8) if year == 2016 else values


@dataclass(frozen=True)
class _Split:
    """Where everything of a split is, and what is taken of it."""

    images: Path
    masks: Path | None
    annotations: Path | None
    year: int
    as_mask: bool
    as_label: bool

    def entries(self, names: list[str]) -> Iterator[DavisItem | Failure]:
        """Frames of a list: those it names, or all of the sequences it names."""
        for name in dict.fromkeys(names):
            if "/" in name:
                yield self._entry(PurePosixPath(name))
                continue
            frames = sorted(path.name for path in (self.images / name).glob("*.jpg"))
            if not frames:
                reason = f"no image: {self.images / name} holds no .jpg"
                yield Failure(name, name, "match", reason)
            for frame in frames:
                yield self._entry(PurePosixPath(name, frame))

    def _entry(self, frame: PurePosixPath) -> DavisItem | Failure:
        png, key = frame.with_suffix(".png"), str(frame.with_suffix(""))
        image = self.images / frame
        mask = None if self.masks is None else self.masks / png
        label = None if self.annotations is None else self.annotations / png
        for what, path in (("image", image), ("mask", mask), ("annotation", label)):
            if path is not None and not path.is_file():
                return Failure(key, str(frame), "match", f"no {what}: {path} is missing")
        files = FileItem(key, str(frame), image, mask, label)
        return DavisItem(files, self.year, self.as_mask, self.as_label)


def _folder(root: Path, kind: str, resolution: str) -> Path:
    folder = root / kind / resolution
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; give --root the folder that holds JPEGImages/ and "
            "Annotations/, and --resolution one of its sub-folders"
        )
    return folder


def _mask_folder(root: Path, masks: str) -> Path:
    for folder in (root / masks, Path(masks)):
        if folder.is_dir():
            return folder
    raise InputError(
        f"no folder of masks {masks!r} below {root}; give --masks a folder, or 'annotations'"
    )


def _read_list(root: Path, split: str, year: int, resolution: str) -> list[str]:
    """Sequences, or frames as `SEQUENCE/00000.jpg`."""
    folders = [root / "ImageSets" / str(year)]
    if year == 2016:
        folders.append(root / "ImageSets" / resolution)
    for folder in folders:
        file = folder / f"{split}.txt"
        if "/" not in split and file.is_file():
            lines = read_names(file, "one sequence, or one frame and its annotation, a line")
            return [_frame_or_sequence(file, line.split()[0]) for line in lines]
    present = sorted({path.stem for folder in folders for path in folder.glob("*.txt")})
    raise InputError(
        f"no split {split!r} in {' or '.join(map(str, folders))}; --split can be one of: "
        f"{', '.join(present) or 'none is there'}"
    )


def _frame_or_sequence(file: Path, name: str) -> str:
    """`/JPEGImages/480p/bear/00000.jpg` to `bear/00000.jpg`; a sequence's name stays."""
    parts = [part for part in name.split("/") if part]
    if not parts or any(part.startswith(".") for part in parts) or len(parts) not in (1, 2, 4):
        raise InputError(
            f"{file} names {name!r}; expected the name of a sequence, as bear, or a frame, as "
            "/JPEGImages/480p/bear/00000.jpg"
        )
    return "/".join(parts[-2:])
