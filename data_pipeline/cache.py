"""Shards at an address, read through a local folder: each is downloaded once and checked.

Ranks of one machine share the folder. What was used longest ago makes room. A file's name holds its
checksum, so that shards which are built again at the same address are never mixed up.
"""

import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write
from data_pipeline.storage import file_system

DEFAULT_FOLDER = Path("~/.cache/maskbank")
DEFAULT_GIB = 100.0
_TRIES = 4  # with 1, 2 and 4 seconds in between
_BLOCK = 1 << 20
_COPY = re.compile(r"[0-9a-f]{32}-.+\.(tar|json|records)")  # what `local` calls its files
log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class ShardCache:
    """The local copy of what lies at an address.

    Attributes:
        address: of the folder of shards.
        folder: where copies are kept.
        max_bytes: of the copies of all addresses in it, about.
    """

    address: str
    folder: Path
    max_bytes: int

    def read(self, name: str) -> bytes:
        """A small file, always asked for anew.

        Raises:
            InputError: it is not there or cannot be read.
        """
        system, path = file_system(f"{self.address}/{name}")
        try:
            data: bytes = _try_again(lambda: system.cat_file(path))
        except FileNotFoundError:
            raise InputError(
                f"{self.address} holds no {name}, so it is no finished set of shards; make one "
                "with `maskbank shards build`, or run an interrupted build again"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self.address}/{name} cannot be read ({error}); check the address, the access "
                "keys and the network"
            ) from None
        return data

    def local(self, name: str, sha256: str, derived: bool = False) -> Path:
        """The local copy of a file, downloaded if it is not there yet.

        A file that has another checksum even when it is loaded again is kept and said: its
        samples have checksums of their own. With `derived`, the checksum is that of the file which
        it was made from, and whoever reads it checks it.

        Raises:
            OSError: it cannot be downloaded.
        """
        path = self._path(name, sha256)
        if not path.exists():
            with self._alone(path):
                if not path.exists():  # another process may have done it meanwhile
                    self._download(name, None if derived else sha256, path)
                    self._make_room(path)
        with suppress(OSError):
            os.utime(path)
        return path

    def forget(self, name: str, sha256: str) -> None:
        """Removes the local copy of a file, if there is one."""
        with suppress(OSError):
            self._path(name, sha256).unlink()

    def _path(self, name: str, sha256: str) -> Path:
        return self.folder / f"{sha256[:32]}-{name}"

    def _download(self, name: str, sha256: str | None, path: Path) -> None:
        system, source = file_system(f"{self.address}/{name}")

        def download() -> str:
            digest = hashlib.sha256()
            with system.open(source, "rb") as remote, atomic_write(path) as file:
                while block := remote.read(_BLOCK):
                    digest.update(block)
                    file.write(block)
            return digest.hexdigest()

        found = _try_again(download)
        if sha256 is not None and found != sha256 and _try_again(download) != sha256:
            log.warning(
                "%s/%s is not what the manifest describes; samples of it that fail their own "
                "checksum are replaced by others",
                self.address,
                name,
            )

    def _make_room(self, newest: Path) -> None:
        files = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                if _COPY.fullmatch(path.name) and path != newest:  # never what others keep there
                    status = path.stat()
                    files.append((status.st_mtime, status.st_size, path))
        total = newest.stat().st_size + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)  # whoever has it open can still read it
            total -= size

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """One process at a time; ends with the process, however."""
        lock = path.with_name(f".{path.name}.lock")
        with lock.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)


def open_cache(address: str, folder: Path | None, max_gib: float) -> ShardCache:
    """The cache of an address below `folder` (default: `~/.cache/maskbank`).

    Raises:
        InputError: the folder cannot be used.
    """
    folder = (folder or DEFAULT_FOLDER).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}, the cache of {address}, cannot be used ({error.strerror}); "
            "set data.cache to another folder"
        ) from None
    return ShardCache(address.rstrip("/"), folder, int(max_gib * 2**30))


def _try_again(action: Callable[[], Result]) -> Result:
    """Does something over a network, again after a pause where it fails; then OSError."""
    for attempt in range(_TRIES):
        try:
            return action()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # what a network's libraries raise is without number
            if attempt == _TRIES - 1:
                raise OSError(f"{type(error).__name__}: {error}") from error
            log.warning("%s; trying again in %d s", error, 2**attempt)
            time.sleep(2**attempt)
    raise AssertionError
