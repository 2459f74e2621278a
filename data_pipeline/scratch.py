"""Databases on local disk for what has to be sorted or joined, so that memory stays bounded."""

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from data_pipeline.errors import InputError

_CACHE_KIB = 16384


@contextmanager
def scratch_database(schema: str) -> Iterator[sqlite3.Connection]:
    """Yields an empty database with the tables of `schema`; it is gone when the block ends.

    Raises:
        InputError: there is no space for it.
    """
    with (
        tempfile.TemporaryDirectory(prefix="maskbank-scratch-") as folder,
        open_scratch(Path(folder) / "scratch.sqlite", schema) as database,
    ):
        yield database


@contextmanager
def open_scratch(path: Path, schema: str) -> Iterator[sqlite3.Connection]:
    """The same in a new file of one's own, which stays; nothing of it is synced."""
    try:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")
            database.execute("PRAGMA temp_store = FILE")
            database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            database.executescript(schema)
            yield database
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"samples cannot be sorted in {path.parent} ({error}); give TMPDIR a folder with space"
        ) from None
