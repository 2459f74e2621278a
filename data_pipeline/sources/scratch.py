"""A database on local disk for what a source has to sort or join, so that memory stays bounded."""

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
    with tempfile.TemporaryDirectory(prefix="maskbank-source-") as folder:
        try:
            with closing(sqlite3.connect(Path(folder) / "scratch.sqlite")) as database:
                database.execute("PRAGMA journal_mode = OFF")
                database.execute("PRAGMA synchronous = OFF")
                database.execute("PRAGMA temp_store = FILE")
                database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                database.executescript(schema)
                yield database
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"the list of samples cannot be sorted in {folder} ({error}); "
                "give TMPDIR a folder with space"
            ) from None
