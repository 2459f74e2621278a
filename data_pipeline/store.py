"""The folder that shards are written to: here, or at an address such as `s3://bucket/shards`.

Files in it are either whole or absent. Errors in writing say what they mean and what to do.
"""

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from data_pipeline.errors import InputError
from data_pipeline.files import TEMPORARY, atomic_write, require_writable
from data_pipeline.storage import Location, as_location, file_system


class Store(Protocol):
    """A folder of named files. Picklable."""

    def prepare(self) -> None:
        """Makes the folder; InputError where it cannot be made or written to."""
        ...

    def names(self) -> set[str]:
        """Names of its files that are not hidden."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file, -1 where it is missing."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """A file to read, with seek; OSError where it is missing."""
        ...

    def writing(self, name: str) -> Any:
        """Context of a file that takes the place of `name` once the block ends, if it does well."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        ...

    def clean(self, mine: Callable[[str], bool]) -> None:
        """Removes what killed writers have left of the files whose names are `mine`."""
        ...


def open_store(location: Location) -> "LocalStore | RemoteStore":
    location = as_location(location)
    return LocalStore(location) if isinstance(location, Path) else RemoteStore(location.rstrip("/"))


@dataclass(frozen=True)
class LocalStore:
    """A folder of this machine's file systems."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def prepare(self) -> None:
        require_writable(self.root)
        self.root.mkdir(parents=True, exist_ok=True)

    def names(self) -> set[str]:
        return {name for name in os.listdir(self.root) if not name.startswith(".")}

    def size(self, name: str) -> int:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return -1

    def open(self, name: str) -> IO[bytes]:
        return (self.root / name).open("rb")

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        with explained(str(self)), atomic_write(self.root / name) as file:
            yield file

    def remove(self, name: str) -> None:
        with explained(str(self)):
            (self.root / name).unlink(missing_ok=True)

    def clean(self, mine: Callable[[str], bool]) -> None:
        for name in os.listdir(self.root):
            found = re.fullmatch(rf"\.(.+){TEMPORARY}", name)
            if found and mine(found[1]):
                with suppress(OSError):  # of a full or failing disk, where the first error matters
                    (self.root / name).unlink()


@dataclass(frozen=True)
class RemoteStore:
    """A folder that fsspec reaches. Files appear there whole, once they are uploaded."""

    address: str

    def __str__(self) -> str:
        return self.address

    def prepare(self) -> None:
        try:
            system, path = file_system(self.address)
            system.makedirs(path, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.address} cannot be used as output ({error}); check the address, that the "
                "bucket exists, and the access keys"
            ) from None

    def names(self) -> set[str]:
        system, path = file_system(self.address)
        system.invalidate_cache(path)
        with suppress(FileNotFoundError):  # an empty folder is none there
            entries = system.ls(path, detail=True)
            return {str(e["name"]).rpartition("/")[2] for e in entries if e["type"] == "file"}
        return set()

    def size(self, name: str) -> int:
        system, path = file_system(f"{self.address}/{name}")
        system.invalidate_cache()
        with suppress(FileNotFoundError):
            return int(system.info(path)["size"])
        return -1

    def open(self, name: str) -> IO[bytes]:
        system, path = file_system(f"{self.address}/{name}")
        opened: IO[bytes] = system.open(path, "rb")
        return opened

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        with explained(self.address), tempfile.NamedTemporaryFile(prefix="maskbank-") as file:
            yield file
            file.flush()
            system, path = file_system(f"{self.address}/{name}")
            system.put_file(file.name, path)

    def remove(self, name: str) -> None:
        system, path = file_system(f"{self.address}/{name}")
        with suppress(FileNotFoundError):
            system.rm_file(path)

    def clean(self, mine: Callable[[str], bool]) -> None:
        """Nothing to do: what was not uploaded as a whole is not there."""


@contextmanager
def explained(output: str) -> Iterator[None]:
    """Says of an error in writing what it means and what to do; passes between processes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                "no space left; free some and run the same command again: finished shards stay"
            )
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(
                f"{output} cannot be written to ({error.strerror}); mend its rights and run the "
                "same command again, or give --output another folder"
            ) from None
        elif error.errno == errno.ENOENT:
            raise InputError(
                f"{output} has vanished while shards were written; bring it back and run the same "
                "command again to go on"
            ) from None
        else:
            reason = error.strerror or str(error)
            message = f"cannot be written ({reason}); run the same command again to go on"
        raise OSError(error.errno or errno.EIO, message, output) from None
