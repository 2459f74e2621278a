"""COCO 2017 and COCO-Stuff: instances as masks, things or super-categories as labels.

| what | where, the first that is there |
|---|---|
| images | `ROOT/SPLIT/*.jpg`, `ROOT/images/SPLIT/*.jpg` |
| instances | `ROOT/annotations/instances_SPLIT.json` |
| pixel maps | `stuffthingmaps/SPLIT/*.png` below `ROOT` or `ROOT/annotations`, |
|  | `ROOT/annotations/SPLIT/*.png`, or, unpacked among the images, `ROOT/SPLIT/*.png` |
"""

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sample import RawSample, open_image
from data_pipeline.scratch import scratch_database
from data_pipeline.sources.coco_classes import (
    names_27,
    names_81,
    table_27,
    table_81,
    thing_classes,
)
from data_pipeline.sources.coco_instances import draw_classes, draw_proposals, draw_regions
from data_pipeline.sources.item import Failure, FileItem, FilesOfItem, Listing
from data_pipeline.sources.json_stream import stream_lists
from data_pipeline.sources.name_list import read_names
from data_pipeline.storage import size_of

LabelKind = Literal["27", "81", "none"]
LABEL_KINDS = ("27", "81", "none")
INSTANCES = "instances"
_PIXEL_MAPS = (
    *("stuffthingmaps", "stuffthingmaps_trainval2017"),
    *("annotations/stuffthingmaps", "annotations/stuffthingmaps_trainval2017"),
    *("annotations", "."),
)
_ID_DIGITS = 12  # of COCO's file names
_SCHEMA = """
CREATE TABLE file (name BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE wanted (name BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE image (name BLOB PRIMARY KEY, id INTEGER, height INTEGER, width INTEGER) WITHOUT ROWID;
CREATE TABLE annotation (image INTEGER, data TEXT);
"""


@dataclass(frozen=True)
class CocoItem(FilesOfItem):
    """One image of COCO.

    Attributes:
        files: its image, and its mask if that is a file.
        pixel_map: file of COCO-Stuff's labels; without it they are drawn from the instances.
        instances: compressed JSON: height, width and annotations; empty if they are not needed.
        draw_masks: whether the instances are its mask.
        labels: kind of its labels.
        instance_area: see `draw_proposals`.
    """

    pixel_map: Path | None
    instances: bytes
    draw_masks: bool
    labels: LabelKind
    instance_area: float

    def read(self) -> RawSample:
        raw = self.files.read()
        mask: Any = raw.mask
        label = None if self.pixel_map is None else _read_pixel_map(self.pixel_map, self.labels)
        if self.instances:
            found = json.loads(zlib.decompress(self.instances))
            height, width = found["height"], found["width"]
            regions = draw_regions(found["annotations"], height, width)
            if self.draw_masks:
                mask = draw_proposals(regions, height, width, self.instance_area)
            if self.labels == "81" and label is None:
                label = draw_classes(regions, height, width, thing_classes())
        return RawSample(raw.image, mask, label)

    def sizes(self) -> tuple[int, ...]:
        maps = () if self.pixel_map is None else (size_of(self.pixel_map),)
        return (*super().sizes(), *maps, len(self.instances))


def list_coco(
    root: Path,
    split: str,
    masks: str | None = INSTANCES,
    labels: str = "81",
    instance_area: float = 0.0,
    names: Path | None = None,
) -> Listing:
    """Lists one split of COCO 2017.

    Args:
        root: the folder that holds the split's images, or `images/` with them.
        split: train2017 or val2017.
        masks: `instances` draws them as proposals, crowds as 255; a folder of masks (PNG, named as
            the images, with or without a sub-folder for the split) takes those; `None` takes none.
        labels: `81`: things, stuff being background; from pixel maps, or from the instances where
            there are none. `27`: super-categories of things and stuff, from pixel maps. `none`.
        instance_area: instances below this share of the image are background.
        names: file with one image id or name a line: only these (the curated split).

    Raises:
        InputError: a folder or file is missing or damaged, or an option is wrong.
    """
    if labels not in LABEL_KINDS:
        raise InputError(f"--labels is {labels!r}; it can be {', '.join(LABEL_KINDS)}")
    if not 0 <= instance_area < 1:
        raise InputError(f"--instance-area is {instance_area}; it is a share of the image, 0 to 1")
    images = _image_folder(root, split)
    mask_folder = _mask_folder(root, split, masks)
    maps = None if labels == "none" else _pixel_maps(root, split, labels)
    annotations = None
    if masks == INSTANCES or (labels == "81" and maps is None):
        annotations = root / "annotations" / f"instances_{split}.json"
        if not annotations.is_file():
            raise InputError(
                f"{annotations} is missing; --root should be the folder that holds annotations/, "
                "or leave out what needs it: give --masks a folder or none, and --labels none"
            )
    wanted = None if names is None else read_names(names, "one image id or name a line")
    description = {
        "source": "coco",
        "root": str(root),
        "split": split,
        "masks": masks or "",
        "labels": labels,
        "label_source": "" if labels == "none" else str(maps or annotations),
        "instance_area": instance_area,
        "list": str(names or ""),
    }
    classes = {"27": names_27(), "81": names_81(), "none": ()}[labels]
    roots = tuple(folder for folder in (images, mask_folder, maps) if folder is not None)
    source = _Split(
        images, mask_folder, maps, annotations, masks == INSTANCES, labels, instance_area
    )
    return Listing(source.entries(wanted), classes, description, roots)


@dataclass(frozen=True)
class _Split:
    """Where everything of a split is."""

    images: Path
    masks: Path | None
    pixel_maps: Path | None
    annotations: Path | None
    draw_masks: bool
    labels: Any
    instance_area: float

    def entries(self, wanted: list[str] | None) -> Iterator[CocoItem | Failure]:
        with scratch_database(_SCHEMA) as database:
            _insert(database, "INSERT INTO file VALUES (?)", _image_names(self.images))
            if wanted is not None:
                rows = ((os.fsencode(_file_name(name)),) for name in wanted)
                _insert(database, "INSERT OR IGNORE INTO wanted VALUES (?)", rows)
            if self.annotations is not None:
                _load_annotations(database, self.annotations)
            yield from self._missing(database, wanted is not None)
            chosen = "" if wanted is None else "WHERE name IN (SELECT name FROM wanted)"
            query = (
                f"SELECT name, id, height, width FROM file LEFT JOIN image USING (name) {chosen}"
            )
            for name, number, height, width in database.execute(query):
                yield self._entry(database, os.fsdecode(name), number, height, width)

    def _missing(self, database: sqlite3.Connection, listed: bool) -> Iterator[Failure]:
        """Images that are asked for or annotated, and not there."""
        table = "wanted" if listed else "image"
        query = f"SELECT name FROM {table} WHERE name NOT IN (SELECT name FROM file)"
        for (name,) in database.execute(query):
            file = os.fsdecode(name)
            stem = os.path.splitext(file)[0]
            reason = f"no image: {self.images / file} is missing"
            yield Failure(stem, f"{self.images.name}/{file}", "match", reason)

    def _entry(
        self,
        database: sqlite3.Connection,
        name: str,
        number: int | None,
        height: int | None,
        width: int | None,
    ) -> CocoItem | Failure:
        stem, source = os.path.splitext(name)[0], f"{self.images.name}/{name}"
        instances = b""
        if self.annotations is not None:
            if number is None:
                reason = f"{self.annotations.name} does not list it"
                return Failure(stem, source, "match", reason)
            rows = database.execute("SELECT data FROM annotation WHERE image = ?", (number,))
            text = ",".join(data for (data,) in rows)
            whole = f'{{"height":{height},"width":{width},"annotations":[{text}]}}'
            instances = zlib.compress(whole.encode(), 1)
        png = f"{stem}.png"
        mask = None if self.masks is None else self.masks / png
        pixel_map = None if self.pixel_maps is None else self.pixel_maps / png
        for what, path in (("mask", mask), ("label", pixel_map)):
            if path is not None and not path.is_file():
                return Failure(stem, source, "match", f"no {what}: {path} is missing")
        files = FileItem(stem, source, self.images / name, mask, None)
        return CocoItem(
            files, pixel_map, instances, self.draw_masks, self.labels, self.instance_area
        )


def _image_folder(root: Path, split: str) -> Path:
    candidates = (root / split, root / "images" / split)
    for folder in candidates:
        if split.strip("./") and folder.is_dir() and next(_image_names(folder), None):
            return folder
    looked = " nor ".join(map(str, candidates))
    raise InputError(
        f"no images for --split {split!r}: neither {looked} holds a .jpg; give --root the folder "
        "above them, and --split train2017 or val2017"
    )


def _image_names(folder: Path) -> Iterator[tuple[bytes]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith((".jpg", ".jpeg")) and not entry.name.startswith("."):
                yield (os.fsencode(entry.name),)


def _mask_folder(root: Path, split: str, masks: str | None) -> Path | None:
    if masks is None or masks == INSTANCES:
        return None
    for parent in (root / masks, Path(masks)):
        for folder in (parent / split, parent):
            if folder.is_dir():
                return folder
    raise InputError(
        f"no folder of masks {masks!r} below {root}; give --masks a folder, or 'instances'"
    )


def _pixel_maps(root: Path, split: str, labels: str) -> Path | None:
    for name in _PIXEL_MAPS:
        folder = root / name / split
        if folder.is_dir() and any(entry.endswith(".png") for entry in _names(folder)):
            return folder
    if labels == "27":
        looked = ", ".join(f"{name}/{split}" for name in _PIXEL_MAPS)
        raise InputError(
            f"{root} has no pixel maps of COCO-Stuff for --labels 27: looked for PNG files in "
            f"{looked}; unpack stuffthingmaps_trainval2017.zip into {root / 'stuffthingmaps'}"
        )
    return None


def _names(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name


def _file_name(name: str) -> str:
    """`139`, `000000000139`, `val2017/000000000139.jpg` to the file's name."""
    stem = name.rpartition("/")[2].removesuffix(".jpg")
    return (stem.zfill(_ID_DIGITS) if stem.isdecimal() else stem) + ".jpg"


def _insert(database: sqlite3.Connection, statement: str, rows: Iterator[Any]) -> None:
    while part := list(islice(rows, 1000)):
        database.executemany(statement, part)


def _load_annotations(database: sqlite3.Connection, path: Path) -> None:
    kept = ("id", "category_id", "iscrowd", "segmentation")
    images: list[tuple[Any, ...]] = []
    annotations: list[tuple[Any, ...]] = []

    def flush() -> None:
        database.executemany("INSERT OR REPLACE INTO image VALUES (?, ?, ?, ?)", images)
        database.executemany("INSERT INTO annotation VALUES (?, ?)", annotations)
        images.clear()
        annotations.clear()

    for kind, each in stream_lists(path):
        try:
            if kind == "images":
                name = os.fsencode(str(each["file_name"]).rpartition("/")[2])
                images.append((name, int(each["id"]), int(each["height"]), int(each["width"])))
            elif kind == "annotations":
                data = json.dumps({key: each.get(key) for key in kept}, separators=(",", ":"))
                annotations.append((int(each["image_id"]), data))
            if len(images) + len(annotations) >= 1000:
                flush()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(
                f"{path}: one of its {kind} is not as COCO has them ({type(error).__name__}: "
                f"{error}); copy it here again"
            ) from None
    flush()
    database.execute("CREATE INDEX by_image ON annotation (image)")


def _read_pixel_map(path: Path, labels: LabelKind) -> NDArray[np.uint8]:
    """Class indices [H, W] from a file of COCO-Stuff."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SampleError("label", f"{path} cannot be read ({error.strerror})") from None
    image = open_image(data, "label", ("PNG",))
    if image.mode not in ("L", "P"):
        raise SampleError(
            "label", f"is {image.mode}; COCO-Stuff's pixel maps have one 8-bit channel"
        )
    table = table_27() if labels == "27" else table_81()
    classes: NDArray[np.uint8] = np.take(table, np.asarray(image))
    return classes
