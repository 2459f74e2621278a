"""Files that are either whole or absent: written aside, synced, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file that takes the place of `path` once the block ends, and only if it ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes `value` as JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=indent, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file is missing, unreadable or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{what} {path} is not JSON ({error}); it is damaged") from None
    if not isinstance(value, dict):
        raise InputError(f"{what} {path} holds no JSON object; it is damaged or of another program")
    return value


def sync_directory(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
