"""A list of images, with their masks and labels, as CSV, TSV or Parquet.

Columns, in any order: `image`, and of these any: `mask`, `label`, `key`, `sha256` (of the image's
file). Paths are relative to the list's folder, absolute, or addresses such as `s3://bucket/a.jpg`.
An empty cell is no mask, no label, and so on.
"""

import csv
import difflib
import hashlib
import io
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import InputError, SampleError
from data_pipeline.sample import RawSample
from data_pipeline.sources.item import Failure, FileItem, FilesOfItem, Listing
from data_pipeline.sources.walk import below
from data_pipeline.storage import Location, as_location, file_system, is_remote

COLUMNS = ("image", "mask", "label", "key", "sha256")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PARQUET = ".parquet"
_LONGEST_LINE = 1 << 20  # characters; what is longer is no list of paths
_SHA256 = re.compile(r"[0-9a-f]{64}")

Row = tuple[int, list[str]]


@dataclass(frozen=True)
class ListedItem(FilesOfItem):
    """One row of a list.

    Attributes:
        files: its image, mask and label.
        sha256: what the image's file should have, in hex; empty: not checked.
    """

    sha256: str

    def read(self) -> RawSample:
        for stage in ("image", "mask", "label"):
            location = getattr(self.files, stage)
            if isinstance(location, Path) and location.exists() and not location.is_file():
                raise SampleError(stage, f"{location} is no file")  # a device would never end
        raw = self.files.read()
        if self.sha256:
            found = hashlib.sha256(raw.image).hexdigest()
            if found != self.sha256:
                reason = f"has another sha256 than the list says: {found}, not {self.sha256}"
                raise SampleError("image", reason)
        return raw


def list_images(path: Location, classes: tuple[str, ...] = ()) -> Listing:
    """Lists the rows of a CSV, TSV or Parquet file; memory does not grow with their number.

    Args:
        path: file or address of the list; its suffix says what it is.
        classes: names of the label classes, background first; needed if there are labels.

    Raises:
        InputError: the list cannot be read, has no header with the column `image`, or labels
            without classes.
    """
    path = as_location(path)
    suffix = os.path.splitext(str(path))[1].lower()
    if suffix not in (*_DELIMITERS, _PARQUET):
        raise InputError(f"{path} is no list that is read: --list needs .csv, .tsv or .parquet")
    with _explained(path):
        header = _parquet_header(path) if suffix == _PARQUET else _csv_header(path, suffix)
    _check_header(path, header, classes)
    description = {
        "source": "list",
        "list": str(path),
        "columns": ", ".join(name for name in header if name in COLUMNS),
    }
    roots = (path.parent,) if isinstance(path, Path) else ()
    return Listing(_entries(path, suffix, header), classes, description, roots)


def _check_header(path: Location, header: list[str], classes: tuple[str, ...]) -> None:
    has = f"it has {', '.join(header) or 'none'}"
    if "image" not in header:
        raise InputError(
            f"{path} has no column 'image': {has}; the first row should name the columns, of "
            f"which these are read: {', '.join(COLUMNS)}"
        )
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise InputError(f"{path} has the column {twice[0]!r} twice: {has}; rename one")
    for name in header:
        near = difflib.get_close_matches(name.strip().lower(), COLUMNS, 1, 0.8)
        if name not in COLUMNS and near and near[0] not in header:
            raise InputError(
                f"{path} has a column {name!r}, which is not read; rename it to {near[0]!r} or to "
                "something less similar"
            )
    if ("label" in header) != bool(classes):
        raise InputError(
            f"{path}: a column 'label' and --classes go together, as evaluation needs a name for "
            f"every class index; {has}, and there are {len(classes)} class names"
        )


def _entries(path: Location, suffix: str, header: list[str]) -> Iterator[ListedItem | Failure]:
    what = "row" if suffix == _PARQUET else "line"
    folder = _folder_of(path)
    name = os.path.basename(str(path))
    with _explained(path):
        rows = _parquet_rows(path, header) if suffix == _PARQUET else _csv_rows(path, suffix)
        for number, row in rows:
            key, source = f"{name}:{number}", f"{name}, {what} {number}"
            if isinstance(row, str):
                yield Failure(key, source, "match", row)
            elif len(row) != len(header):
                reason = f"has {len(row)} fields instead of {len(header)}: {', '.join(header)}"
                yield Failure(key, source, "match", reason)
            else:
                cells = {column: cell.strip() for column, cell in zip(header, row, strict=True)}
                yield _entry(folder, cells, key, source)


def _entry(
    folder: Location, cells: dict[str, str], place: str, source: str
) -> ListedItem | Failure:
    """One row as a sample. `place` and `source` name it if it is none."""
    image, sha256 = cells["image"], cells.get("sha256", "").lower()
    if not image:
        return Failure(place, source, "match", "names no image")
    if sha256 and not _SHA256.fullmatch(sha256):
        reason = f"its sha256 is {sha256[:80]!r}; expected 64 hex digits"
        return Failure(place, source, "match", reason)
    if any("\0" in cell for cell in cells.values()):
        return Failure(place, source, "match", "has a null character")
    key = cells.get("key") or _key_of(folder, image)
    mask, label = (
        _resolve(folder, cells[name]) if cells.get(name) else None for name in ("mask", "label")
    )
    return ListedItem(FileItem(key, image, _resolve(folder, image), mask, label), sha256)


def _folder_of(path: Location) -> Location:
    return path.parent if isinstance(path, Path) else path.rpartition("/")[0]


def _resolve(folder: Location, name: str) -> Location:
    if is_remote(name):
        return name
    return Path(name) if os.path.isabs(name) else below(folder, name)


def _key_of(folder: Location, image: str) -> str:
    """The path without suffix: relative to the list's folder if it is in it."""
    stem = os.path.splitext(image)[0]
    if is_remote(stem):
        stem = stem.removeprefix(f"{folder}/")
        stem = stem.partition("://")[2] if is_remote(stem) else stem
    elif os.path.isabs(stem):
        stem = posixpath.normpath(stem)
        stem = stem.removeprefix(f"{os.path.abspath(folder)}/")
    return posixpath.normpath(stem).lstrip("/")


@contextmanager
def _explained(path: Location) -> Iterator[None]:
    """Says of what a reader stumbles over where it is and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path} cannot be read ({reason}); check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None


@contextmanager
def _open(path: Location) -> Iterator[IO[bytes]]:
    if isinstance(path, Path):
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no file, and a list is read twice: save it as one")
        with path.open("rb") as local:
            yield local
    else:
        system, name = file_system(path)
        with system.open(name, "rb") as remote:
            yield remote


# ---------------------------------------------------------------- CSV and TSV


def _csv_rows(path: Location, suffix: str) -> Iterator[tuple[int, list[str] | str]]:
    """Line number and fields, or what is wrong with them; the header is passed over."""
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = _csv_reader(text, suffix)
        first = True
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield reader.line_num, f"is no row of a {suffix[1:].upper()} file ({error})"
                first = False
                continue
            if row is None:
                return
            if row and not first:
                yield reader.line_num, row
            first = first and not row


def _csv_header(path: Location, suffix: str) -> list[str]:
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        header: list[str] = []
        try:
            header = next((row for row in _csv_reader(text, suffix) if row), header)
        except csv.Error as error:
            raise InputError(f"{path} has no header that can be read ({error})") from None
    return [name.strip() for name in header]


def _csv_reader(text: IO[str], suffix: str) -> Any:
    lines = iter(lambda: text.readline(_LONGEST_LINE), "")
    return csv.reader(lines, delimiter=_DELIMITERS[suffix], strict=True)


# ---------------------------------------------------------------- Parquet


def _parquet_header(path: Location) -> list[str]:
    with _parquet_file(path) as table:
        return [str(name) for name in table.schema_arrow.names]


def _parquet_rows(path: Location, header: list[str]) -> Iterator[Row]:
    wanted = [name for name in header if name in COLUMNS]
    number = 0
    with _parquet_file(path) as table:
        for batch in table.iter_batches(batch_size=1000, columns=wanted):
            columns = [batch.column(name).to_pylist() for name in wanted]
            for values in zip(*columns, strict=True):
                number += 1
                cells = dict(zip(wanted, map(_cell, values), strict=True))
                yield number, [cells.get(name, "") for name in header]


def _cell(value: Any) -> str:
    return "" if value is None else value.decode() if isinstance(value, bytes) else str(value)


@contextmanager
def _parquet_file(path: Location) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path} needs pyarrow: pip install 'maskbank[parquet]', or give a .csv"
        ) from None
    with _open(path) as file:
        try:
            yield parquet.ParquetFile(file)
        except pyarrow.ArrowException as error:
            raise InputError(f"{path} is no Parquet file, or damaged ({error})") from None
