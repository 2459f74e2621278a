"""Which sample goes into which shard: decided for all of them before anything is written.

The plan lives in a database on local disk, so that memory does not grow with the number of samples;
workers read their shard from it. It belongs to one run and is gone with it: a build that goes on
plans again and compares fingerprints.
"""

import hashlib
import json
import pickle
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.build_config import BuildConfig
from data_pipeline.sample import safe_key
from data_pipeline.scratch import open_scratch
from data_pipeline.sources.item import Failure, Item, Listing, share_a_stem

_SCHEMA = """
CREATE TABLE listed (key BLOB, rank INTEGER, size INTEGER, source BLOB, data BLOB);
CREATE TABLE unmatched (key BLOB, source BLOB, stage BLOB, reason BLOB);
CREATE TABLE skipped (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE wanted (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE placed (shard INTEGER, place INTEGER, item INTEGER, PRIMARY KEY (shard, place))
    WITHOUT ROWID;
CREATE TABLE shard (number INTEGER PRIMARY KEY, samples INTEGER, fingerprint TEXT);
"""


@dataclass(frozen=True)
class PlannedShard:
    """One shard to be: its number, planned samples, and what tells it from others."""

    number: int
    samples: int
    fingerprint: str


class Plan:
    """The samples of a listing, in order and cut into shards.

    Args:
        listing: its entries are iterated once, here.
        config: what decides order and cuts.
        first_shard: number of the first shard.
        skipped: keys that are passed over, as they are in other shards already.
        only: if given, all other keys are passed over.

    Attributes:
        samples, shards, unmatched, passed_over: counts.
        fingerprint: of the whole plan.
        path: of the database.

    Raises:
        InputError: the source has something wrong, or there is no space for the plan.
    """

    def __init__(
        self,
        listing: Listing,
        config: BuildConfig,
        first_shard: int = 0,
        skipped: Iterable[str] = (),
        only: Iterable[str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="maskbank-plan-")
        self.path = Path(self._folder.name) / "plan.sqlite"
        self.first_shard = first_shard
        self.passed_over = 0
        with open_scratch(self.path, _SCHEMA) as database:
            self._list(database, listing, config, skipped, only)
            self._fail_shared_keys(database)
            self._cut(database, listing.classes, config)
            self.unmatched = _count(database, "unmatched")

    def close(self) -> None:
        self._folder.cleanup()

    def planned_shards(self) -> Iterator[PlannedShard]:
        """All shards in the order of their numbers."""
        with closing(sqlite3.connect(self.path)) as database:
            for row in database.execute("SELECT number, samples, fingerprint FROM shard"):
                yield PlannedShard(*row)

    def unmatched_failures(self) -> Iterator[Failure]:
        """What could not be matched, in the order of source and key."""
        with closing(sqlite3.connect(self.path)) as database:
            rows = database.execute(
                "SELECT key, source, stage, reason FROM unmatched ORDER BY source, key, reason"
            )
            for row in rows:
                yield Failure(*map(_text, row))

    def _list(
        self,
        database: sqlite3.Connection,
        listing: Listing,
        config: BuildConfig,
        skipped: Iterable[str],
        only: Iterable[str] | None,
    ) -> None:
        database.executemany(
            "INSERT OR IGNORE INTO skipped VALUES (?)", ((_blob(key),) for key in skipped)
        )
        database.executemany(
            "INSERT OR IGNORE INTO wanted VALUES (?)", ((_blob(key),) for key in only or ())
        )
        seed = _seed_bytes(config.shuffle_seed)

        def rows() -> Iterator[tuple[Any, ...]]:
            for entry in listing.entries:
                if isinstance(entry, Failure):
                    failure = (entry.key, entry.source, entry.stage, entry.reason)
                    unmatched.append(tuple(map(_blob, failure)))
                    continue
                key = safe_key(config.key_prefix + entry.key)
                size = sum(entry.sizes()) if config.shard_size else 0
                data = pickle.dumps(entry)  # for this run's own workers, as their pipes would do
                yield _blob(key), _rank(seed, key), size, _blob(entry.source), data

        unmatched: list[tuple[bytes, ...]] = []
        pending = rows()
        insert = "INSERT INTO listed VALUES (?, ?, ?, ?, ?)"
        while part := list(islice(pending, 1000)):
            database.executemany(insert, part)
            _flush(database, unmatched)
        _flush(database, unmatched)
        before = _count(database, "listed")
        database.execute("DELETE FROM listed WHERE key IN (SELECT key FROM skipped)")
        if only is not None:
            database.execute("DELETE FROM listed WHERE key NOT IN (SELECT key FROM wanted)")
        self.passed_over = before - _count(database, "listed")

    def _fail_shared_keys(self, database: sqlite3.Connection) -> None:
        """Samples that share a key all fail: none is silently the winner."""
        database.execute("CREATE INDEX by_key ON listed (key)")
        shared = "SELECT key FROM listed GROUP BY key HAVING count(*) > 1"
        for (key,) in database.execute(shared).fetchall():
            rows = database.execute(
                "SELECT source FROM listed WHERE key = ? ORDER BY source", (key,)
            ).fetchall()
            names = [_text(source) for (source,) in rows[:5]]
            reason = share_a_stem(names, more=len(rows) > 5)
            database.executemany(
                "INSERT INTO unmatched VALUES (?, ?, ?, ?)",
                [(key, source, b"match", _blob(reason)) for (source,) in rows],
            )
        database.execute(f"DELETE FROM listed WHERE key IN ({shared})")

    def _cut(
        self, database: sqlite3.Connection, classes: tuple[str, ...], config: BuildConfig
    ) -> None:
        """Puts the samples in order and into shards; a shard ends where it reaches a limit."""
        number, samples, size = self.first_shard, 0, 0
        whole = hashlib.sha256()
        digest = _shard_digest(config, classes)

        def end_shard() -> None:
            nonlocal number, samples, size, digest
            fingerprint = digest.hexdigest()
            whole.update(digest.digest())
            database.execute("INSERT INTO shard VALUES (?, ?, ?)", (number, samples, fingerprint))
            number, samples, size, digest = number + 1, 0, 0, _shard_digest(config, classes)

        limit = config.limit or -1
        query = "SELECT rowid, key, size, source FROM listed ORDER BY rank, key LIMIT ?"
        rows = database.execute(query, (limit,))
        while part := rows.fetchmany(1000):
            placed = []
            for row, key, bytes_, source in part:
                too_large = config.shard_size and size + bytes_ > config.shard_size
                if samples and (samples == config.samples_per_shard or too_large):
                    end_shard()
                placed.append((number, samples, row))
                digest.update(key + b"\0" + source + b"\0")
                samples, size = samples + 1, size + bytes_
            database.executemany("INSERT INTO placed VALUES (?, ?, ?)", placed)
        if samples:
            end_shard()
        database.commit()
        self.samples = _count(database, "placed")
        self.shards = number - self.first_shard
        self.fingerprint = whole.hexdigest()


class PlanReader:
    """A worker's view of a plan."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)

    def items(self, shard: int) -> Iterator[tuple[str, Item]]:
        """(safe key, sample) of a shard, in order."""
        query = (
            "SELECT key, data FROM placed JOIN listed ON listed.rowid = placed.item "
            "WHERE shard = ? ORDER BY place"
        )
        for key, data in self._database.execute(query, (shard,)):
            yield _text(key), pickle.loads(data)


def _flush(database: sqlite3.Connection, unmatched: list[tuple[bytes, ...]]) -> None:
    database.executemany("INSERT INTO unmatched VALUES (?, ?, ?, ?)", unmatched)
    unmatched.clear()


def _count(database: sqlite3.Connection, table: str) -> int:
    return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def _seed_bytes(seed: int) -> bytes | None:
    return None if seed < 0 else seed.to_bytes(8, "little")


def _rank(seed: bytes | None, key: str) -> int:
    """A place in the shuffled order that depends on the seed and this key alone."""
    if seed is None:
        return 0
    digest = hashlib.blake2b(key.encode(), digest_size=8, key=seed).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shard_digest(config: BuildConfig, classes: tuple[str, ...]) -> Any:
    return hashlib.sha256(json.dumps([asdict(config), classes], sort_keys=True).encode() + b"\0")


def _blob(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # file names need not be UTF-8


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
