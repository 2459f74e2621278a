"""All files below a folder, here or at an address, one after the other and in no order."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.storage import Location, as_location, file_system, is_remote


def below(folder: Location, *names: str) -> Location:
    """What is called so below a folder."""
    if is_remote(folder):
        return "/".join((str(folder).rstrip("/"), *names))
    return Path(folder).joinpath(*names)


def is_folder(location: Location) -> bool:
    """Whether a folder is there; InputError where an address cannot be asked."""
    if not is_remote(location):
        return Path(location).is_dir()
    system, path = file_system(str(location))
    try:
        return bool(system.isdir(path))
    except Exception as error:  # each file system has errors of its own
        raise _not_listed(str(location), error) from None


def check_folder(location: Location, option: str) -> Location:
    """The location of a folder that is there.

    Raises:
        InputError: it is not; names the command's option.
    """
    location = as_location(location)
    if not is_folder(location):
        raise InputError(f"{location} is not a folder; check the path given to {option}")
    return location


def walk_files(folder: Location) -> Iterator[str]:
    """Relative paths of all files below `folder` that are not hidden.

    Links are followed, but not in circles. A link to nothing is listed, so that it becomes a
    failure; a pipe or device, which would hang or never end, is not. Memory is bounded by the
    depth of the tree; of a folder elsewhere, by its largest folder, as its listing comes whole.

    Raises:
        InputError: a folder cannot be listed.
    """
    return _walk_remote(str(folder)) if is_remote(folder) else _walk_local(os.fspath(folder))


def _walk_local(root: str) -> Iterator[str]:
    stack = [(_scan(root), "", os.path.realpath(root))]
    try:
        while stack:
            entries, prefix, folder = stack[-1]
            try:
                entry = next(entries, None)
                if entry is None:
                    stack.pop()
                    continue
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if all(real != above for _, _, above in stack):
                        stack.append((_scan(entry.path), f"{prefix}{entry.name}/", real))
                    continue
                found = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
            except OSError as error:
                raise _not_listed(error.filename or folder, error) from None
            if found:
                yield prefix + entry.name
    finally:
        for entries, _, _ in stack:
            entries.close()


def _scan(folder: str) -> Any:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise _not_listed(folder, error) from None


def _walk_remote(root: str) -> Iterator[str]:
    system, top = file_system(root)
    top = top.rstrip("/")
    pending = [top]
    while pending:
        folder = pending.pop()
        try:
            entries = system.ls(folder, detail=True)
            system.invalidate_cache(folder)
        except Exception as error:  # each file system has errors of its own
            raise _not_listed(root, error) from None
        for entry in entries:
            path = str(entry["name"]).rstrip("/")
            name = path.rpartition("/")[2]
            if path == folder or name.startswith("."):  # a folder's own marker among its entries
                continue
            if entry["type"] == "directory":
                pending.append(path)
            elif entry["type"] == "file":
                yield path[len(top) + 1 :]


def _not_listed(folder: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    remedy = "check the address and the access keys" if is_remote(folder) else "mend its rights"
    return InputError(f"{folder} cannot be listed ({reason}); {remedy}")
