"""Files that are either whole or absent: written aside, synced, then renamed."""

import fcntl
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import InputError

TEMPORARY = r"\.[0-9a-f]{12}\.tmp"  # what `atomic_write` appends, for those who clean up


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file that takes the place of `path` once the block ends, if it ends well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


class OpenFile:
    """A file to `pread` from, closed with its owner, also when a thread ends.

    Attributes:
        descriptor: of it; valid as long as someone holds this object.
    """

    def __init__(self, path: Path) -> None:
        # not blocking: a pipe in the place of a file is then an error instead of a wait
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def read(self) -> bytes:
        """All of it; OSError where it is no file."""
        blocks, place = [], 0
        while block := os.pread(self.descriptor, 1 << 24, place):
            blocks.append(block)
            place += len(block)
        return b"".join(blocks)

    def __del__(self) -> None:
        descriptor = getattr(self, "descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


def require_writable(folder: Path, option: str = "--output") -> None:
    """Raises InputError where nothing can be written below `folder`, which need not exist yet.

    For use before any work. Leaves nothing behind: a nameless file is made in the nearest folder
    that exists, since access rights alone do not tell (root, read-only and special file systems).
    """
    _require_writable(folder, f"{option} {folder}")


def require_writable_file(path: Path, option: str = "--output") -> None:
    """The same for a file, which may exist already: InputError unless it can be written."""
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; give the path of a file")
    # writing replaces the file, which would turn /dev/null into a file
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path} is a device or a pipe; give the path of a file")
    _require_writable(path.parent, f"{option} {path}")


def _require_writable(place: Path, named: str) -> None:
    try:
        while not _exists(place):
            place = place.parent
        if not place.is_dir():
            raise InputError(f"{named} cannot be used: {place} is not a folder; give another path")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            f"{named} cannot be written to ({place}: {error.strerror}); give another path, or mend "
            "its permissions"
        ) from None


def _exists(path: Path) -> bool:
    """Whether there is something of that name; OSError where that cannot be told."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def encode_json(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8; a file name that is not UTF-8 survives as `\\udcXX` escapes."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes `value` as JSON, atomically."""
    with atomic_write(path) as file:
        file.write(encode_json(value, indent) + b"\n")


def read_bytes(path: Path, what: str, remedy: str) -> bytes:
    """Reads a small file; InputError, with what to do about it, where that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror}): {remedy}") from None


def parse_json(data: bytes, path: Path | str, what: str, remedy: str) -> dict[str, Any]:
    """Parses the JSON object that was read from `path`.

    Raises:
        InputError: `data` is something else; names the file and what to do about it.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} is damaged, not JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{what} {path} is damaged, it holds no JSON object: {remedy}")
    return value


def read_json(
    path: Path, what: str, remedy: str = "copy it here again or write it again"
) -> dict[str, Any]:
    """Reads a JSON object; raises InputError as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, what, remedy), path, what, remedy)


def sync_directory(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderInUse(InputError):
    """Another process is writing there."""


@contextmanager
def only_writer(folder: Path, shared: bool = False) -> Iterator[None]:
    """Keeps other processes that ask for it out of `folder`; ends with the process, however.

    Args:
        folder: or a file.
        shared: only those are kept out that do not share it.

    Raises:
        FolderInUse: another process is writing there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(
                f"another process is writing to {folder} at this moment; wait until it has ended, "
                "or give --output another folder"
            ) from None
        except OSError:
            pass  # a network file system without locks: two builds at once are the user's care
        yield
    finally:
        os.close(descriptor)
