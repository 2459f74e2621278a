"""Files here and elsewhere: a `Path`, or an address such as `s3://bucket/name`, by fsspec."""

import errno
import os
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError

Location = Path | str
MAX_BYTES = 1 << 30  # of one picture's file


def is_remote(location: Location) -> bool:
    return isinstance(location, str) and "://" in location


def as_location(text: str | Path) -> Location:
    """What a user typed: an address stays one, anything else is a path."""
    return str(text) if is_remote(str(text)) else Path(text)


def file_system(location: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it.

    Raises:
        InputError: no such protocol, or its package is not installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{location} cannot be opened ({error}); pip install 'maskbank[s3]' for s3://"
        ) from None
    return system, path


def read_location(location: Location) -> bytes:
    """All bytes of a file; OSError where that fails, or where there are absurdly many."""
    if not is_remote(location):
        with open(location, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise OSError(errno.EFBIG, f"more than {MAX_BYTES:,} bytes", str(location))
            return file.read()
    system, path = file_system(str(location))
    try:
        data: bytes = system.cat_file(path, end=MAX_BYTES)
    except OSError:
        raise
    except Exception as error:  # no keys, no network: each library has errors of its own
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(location)) from None
    return data


def size_of(location: Location) -> int:
    """Bytes of a file here, -1 where it is missing; 0 for one elsewhere, which is not asked."""
    if is_remote(location):
        return 0
    try:
        return os.stat(location).st_size
    except OSError:
        return -1
