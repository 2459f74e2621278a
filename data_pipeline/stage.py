"""Shards copied to a node's own disk: `python -m data_pipeline.stage SHARDS FOLDER`.

Every file is compared with the manifest's checksum while it is copied, records with their own; the
manifest comes last, so that a folder with one is whole. What was copied before is not copied again.
"""

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.files import FolderInUse, atomic_write, only_writer, require_writable
from data_pipeline.manifest import FILE_NAME, Manifest, ShardEntry, read_manifest
from data_pipeline.write_records import is_whole, write_records

_BLOCK = 4 << 20
_THREADS = 8  # network disks answer many requests at a time
_SPARE_BYTES = 1 << 28
_PAUSE = 0.5  # seconds
_RECORD_BYTES = 256  # of a sample in `.records`, at the most


def stage_shards(
    shards: Path | str, folder: Path, advance: Callable[[int], None] = lambda count: None
) -> Manifest:
    """Copies a set of shards; returns the manifest of the copy.

    Args:
        shards: a folder, or an address.
        folder: on this machine; made if needed.
        advance: is told of bytes that were copied.

    Raises:
        InputError: a file is not what the manifest describes, or the disk is too small.
        OSError: something cannot be read or written.
    """
    source = read_manifest(shards)
    if source.cache is not None:
        raise InputError(
            f"{shards} is an address, whose shards are kept in data.cache anyway; set that to a "
            "folder of the node's own instead of copying them"
        )
    require_writable(folder, "the folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        wanted = _files(source)
        missing = [
            (name, size, digest)
            for name, size, digest in wanted
            if not _is_whole(folder / name, size, digest)
        ]
        without = [entry for entry in source.shards if not is_whole(folder / entry.records, entry)]
        needed = sum(size for _, size, _ in missing)
        needed += sum(entry.samples for entry in without) * _RECORD_BYTES
        free = shutil.disk_usage(folder).free
        if needed + _SPARE_BYTES > free:
            raise InputError(
                f"{folder} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB of shards are "
                "to be copied there; choose a larger disk, or train without a copy"
            )
        with ThreadPoolExecutor(_THREADS) as pool:

            def copy(entry: tuple[str, int, str]) -> None:
                name, size, digest = entry
                _copy(source.root / name, folder / name, digest)
                advance(size)

            def copy_records(entry: ShardEntry) -> None:
                advance(_copy_records(source.root, folder, entry))

            for _ in pool.map(copy, missing):
                pass
            for _ in pool.map(copy_records, without):
                pass
        with atomic_write(folder / FILE_NAME) as file:
            file.write(source.encode())
    return read_manifest(folder)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits for other processes that copy to the same folder: nodes may share it after all."""
    with ExitStack() as lock:
        while True:
            try:
                lock.enter_context(only_writer(folder))
                break
            except FolderInUse:
                time.sleep(_PAUSE)
        yield


def _files(manifest: Manifest) -> list[tuple[str, int, str]]:
    """Name, bytes and SHA-256 of every file that training reads."""
    files = []
    for shard in manifest.shards:
        index = manifest.root / shard.index
        files.append((shard.name, shard.bytes, shard.sha256))
        files.append((shard.index, index.stat().st_size, shard.index_sha256))
    return files


def _is_whole(path: Path, size: int, digest: str) -> bool:
    if not path.exists() or path.stat().st_size != size:
        return False
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest() == digest


def _copy(source: Path, target: Path, digest: str) -> None:
    found = hashlib.sha256()
    with source.open("rb") as file, atomic_write(target) as copy:
        while block := file.read(_BLOCK):
            found.update(block)
            copy.write(block)
        if found.hexdigest() != digest:
            raise InputError(
                f"{source} is not what the manifest describes; `maskbank shards verify` finds what "
                "is wrong, `quarantine` takes it out"
            )


def _copy_records(source: Path, folder: Path, entry: ShardEntry) -> int:
    """Bytes of a shard's records; they are made anew from the copied index if need be."""
    target = folder / entry.records
    if is_whole(source / entry.records, entry):
        with (source / entry.records).open("rb") as file, atomic_write(target) as copy:
            shutil.copyfileobj(file, copy, _BLOCK)
    write_records(folder, entry)
    return target.stat().st_size


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data_pipeline.stage", description=__doc__)
    parser.add_argument("shards", help="folder of finished shards")
    parser.add_argument("folder", type=Path, help="on this machine")
    options = parser.parse_args(arguments)
    try:
        manifest = stage_shards(options.shards, options.folder)
    except InputError as error:
        print(f"maskbank: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"maskbank: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{len(manifest.shards)} shards, {manifest.bytes / 1e9:.2f} GB, in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
