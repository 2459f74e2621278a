"""Images, masks and labels of the same relative stem, joined in trees of any size."""

import os
import sqlite3
from collections.abc import Iterator
from itertools import groupby, islice

from data_pipeline.scratch import scratch_database
from data_pipeline.sources.item import Failure, FileItem
from data_pipeline.sources.walk import below, walk_files
from data_pipeline.storage import Location

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"}
)
MASK_SUFFIXES = IMAGE_SUFFIXES | {".gif"}
OTHER_PICTURES = frozenset(  # not read, but not passed over in silence either
    {".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".pgm", ".ppm", ".dng", ".cr2", ".nef"}
)

_Folders = tuple[Location, Location | None, Location | None]
_IMAGE = 0  # the kinds of files, by the place of their folder
_PARTNERS = ("mask", "label")
_SCHEMA = "CREATE TABLE file (stem BLOB, kind INTEGER, path BLOB, base BLOB)"
_PICTURES = IMAGE_SUFFIXES | OTHER_PICTURES


def pictures(folder: Location) -> Iterator[str]:
    """Relative paths of all pictures below a folder, also of kinds that are not read."""
    return (path for path in walk_files(folder) if _suffix(path) in _PICTURES)


def match_trees(
    images: Location, masks: Location | None, labels: Location | None
) -> Iterator[FileItem | Failure]:
    """Every image with the mask and label of its relative stem, in the order of stems.

    A mask or label at the top of its folder also belongs to an image in a sub-folder, if that has
    none of its path and is the only one of that name. The join is done on disk.

    Args:
        images: folder searched recursively; pictures of a kind that is not read are failures.
        masks: folder of the same tree; an image without a mask is a failure, and a mask without an
            image is one. `None`: no masks.
        labels: the same for labels.

    Raises:
        InputError: a folder cannot be listed, or there is no space for the join.
    """
    folders: _Folders = (images, masks, labels)
    with scratch_database(_SCHEMA) as database:
        for kind, folder in enumerate(folders):
            if folder is not None:
                _load(database, kind, folder)
        if len([folder for folder in folders if folder is not None]) > 1:
            _match_by_name(database)
        rows = database.execute("SELECT stem, kind, path FROM file ORDER BY stem, kind, path")
        for stem, group in groupby(rows, key=lambda row: row[0]):
            files: tuple[list[str], list[str], list[str]] = ([], [], [])
            for _, kind, path in group:
                files[kind].append(os.fsdecode(path))
            yield from _matched(os.fsdecode(stem), files, folders)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _place(folder: Location, path: str) -> str:
    """As text: path objects of millions of files take long to make."""
    return f"{str(folder).rstrip('/')}/{path}"


def _load(database: sqlite3.Connection, kind: int, folder: Location) -> None:
    found = pictures(folder) if kind == _IMAGE else walk_files(folder)

    def rows() -> Iterator[tuple[bytes, int, bytes, bytes | None]]:
        for path in found:
            stem, suffix = os.path.splitext(path)
            if kind == _IMAGE or suffix.lower() in MASK_SUFFIXES:
                base = os.fsencode(stem.rpartition("/")[2]) if "/" in stem else None
                yield os.fsencode(stem), kind, os.fsencode(path), base

    pending = rows()
    while part := list(islice(pending, 1000)):
        database.executemany("INSERT INTO file VALUES (?, ?, ?, ?)", part)


def _match_by_name(database: sqlite3.Connection) -> None:
    """Gives masks and labels without a folder the stem of the one image of that name in any."""
    in_folders = "SELECT 1 FROM file WHERE kind = 0 AND base IS NOT NULL LIMIT 1"
    without = "SELECT 1 FROM file WHERE kind > 0 AND base IS NULL LIMIT 1"
    if not (database.execute(in_folders).fetchone() and database.execute(without).fetchone()):
        return
    database.executescript(
        """
        CREATE INDEX by_stem ON file (stem, kind);
        CREATE TABLE named (base BLOB PRIMARY KEY, stem BLOB) WITHOUT ROWID;
        INSERT INTO named SELECT base, min(stem) FROM file WHERE kind = 0 AND base IS NOT NULL
            GROUP BY base HAVING min(stem) = max(stem);
        CREATE TABLE moved (item INTEGER PRIMARY KEY, stem BLOB);
        INSERT INTO moved SELECT file.rowid, named.stem FROM file
            JOIN named ON named.base = file.stem
            WHERE file.kind > 0 AND file.base IS NULL
            AND NOT EXISTS (SELECT 1 FROM file AS image
                            WHERE image.stem = file.stem AND image.kind = 0)
            AND NOT EXISTS (SELECT 1 FROM file AS own
                            WHERE own.stem = named.stem AND own.kind = file.kind);
        UPDATE file SET stem = (SELECT stem FROM moved WHERE item = file.rowid)
            WHERE rowid IN (SELECT item FROM moved);
        DROP INDEX by_stem;
        """
    )


def _matched(
    stem: str,
    files: tuple[list[str], list[str], list[str]],
    folders: _Folders,
) -> Iterator[FileItem | Failure]:
    """What the files of one stem make: samples, failures, or both."""
    images, *partner_folders = folders
    partners: list[Location | None] = []
    missing = ""
    for what, folder, found in zip(_PARTNERS, partner_folders, files[1:], strict=True):
        if folder is None:
            partners.append(None)
            continue
        partners.append(_place(folder, found[0]) if found else None)
        if not files[0]:
            for path in found:
                reason = f"{what} without an image"
                yield Failure(os.path.splitext(path)[0], str(below(folder, path)), "match", reason)
        elif len(found) != 1 and not missing:
            names = ", ".join(os.path.basename(path) for path in found)
            missing = f"several {what}s: {names}" if found else f"no {what} of that stem"
    for path in files[0]:
        suffix = os.path.splitext(path)[1]
        if suffix.lower() not in IMAGE_SUFFIXES:
            yield Failure(stem, path, "match", f"{suffix} is not read")
        elif missing:
            yield Failure(stem, path, "match", missing)
        else:
            yield FileItem(stem, path, _place(images, path), *partners)
