"""From positions to what a loader has to decode: bytes read and checked, views drawn and chosen."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError, SampleError
from data_pipeline.order import SampleOrder
from data_pipeline.pieces import map_in_pieces
from data_pipeline.reader import SampleReader
from data_pipeline.sample import IGNORE, MASK, UInt8, decode_grey
from data_pipeline.views import View, ViewConfig, choose_window, draw_views

# where nine of ten samples are bad, one position in 10^12 finds nobody; a failed try costs little
MAX_SUBSTITUTES = 256
MAX_REPORTED = 1000  # kinds of failures logged one by one
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchedSample:
    """One sample, its image still encoded.

    Attributes:
        image: encoded bytes, uint8 [n].
        mask: uint8 [H, W], proposal ids.
        views: query and key view, each with exactly one window: the chosen one.
        valid: for each view, whether the mask's coverage of its window is valid.
        sample_id: number of the sample in its data set.
        describe: reads shard and key, for messages.
    """

    image: UInt8
    mask: UInt8
    views: tuple[View, View]
    valid: tuple[bool, bool]
    sample_id: int
    describe: Callable[[], str]

    @property
    def name(self) -> str:
        """Shard and key."""
        return self.describe()

    def view_mask(self, view: int) -> UInt8:
        """The mask that view 0 or 1 is to be cropped from: ignored as a whole if not valid."""
        return self.mask if self.valid[view] else np.full_like(self.mask, IGNORE)


class Fetcher:
    """Fetches samples by position, several at a time; bad ones are replaced and counted.

    Args:
        reader: of the shards.
        order: of the samples.
        config: of the views.
        threads: samples read and decoded at a time.

    Attributes:
        bad_samples: reads that failed and were replaced.
        invalid_views: views without a window of valid coverage.
    """

    def __init__(
        self, reader: SampleReader, order: SampleOrder, config: ViewConfig, threads: int
    ) -> None:
        self.reader = reader
        self.order = order
        self.config = config
        self.bad_samples = 0
        self.invalid_views = 0
        self._reported: set[str] = set()
        self._lock = threading.Lock()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._next_shards: list[int] = []

    def fetch(self, positions: NDArray[np.int64]) -> list[FetchedSample]:
        """The samples at these global positions.

        Raises:
            InputError: a sample and all its substitutes cannot be read.
        """
        shards, samples = self.order.locate(positions)
        self._read_ahead(int(positions[-1]))
        places = list(zip(positions.tolist(), shards.tolist(), samples.tolist(), strict=True))
        fetched = map_in_pieces(
            self._pool, self._threads, lambda place: self._fetch_one(*place), places
        )
        self.invalid_views += sum(not valid for sample in fetched for valid in sample.valid)
        return fetched

    def close(self) -> None:
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self, position: int) -> None:
        """Shards at an address are downloaded one window before they are needed."""
        if self.reader.index.manifest.cache is None:
            return
        shards = self.order.next_window(position)
        if shards != self._next_shards:
            self._next_shards = shards
            for shard in shards:
                self._ahead.submit(self.reader.read_ahead, shard)

    def _fetch_one(self, position: int, shard: int, sample: int) -> FetchedSample:
        first_error: SampleError | None = None
        for attempt, (place, number) in enumerate(self._places(position, shard, sample)):
            try:
                return self._load(position, place, number)
            except SampleError as error:
                first_error = first_error or error
                self._report(error, attempt)
        raise InputError(
            f"position {position}: {first_error}, and {MAX_SUBSTITUTES} substitutes failed too; "
            "check the shards with `maskbank shards verify "
            f"{self.reader.index.manifest.root}`"
        )

    def _places(self, position: int, shard: int, sample: int) -> Iterator[tuple[int, int]]:
        yield shard, sample
        for attempt in range(MAX_SUBSTITUTES):
            yield self.order.substitute(position, attempt)

    def _load(self, position: int, shard: int, sample: int) -> FetchedSample:
        try:
            record = self.reader.index.record(shard, sample)
        except InputError as error:  # no index: nothing of the shard can be found
            raise SampleError("index", str(error)) from None
        raw = self.reader.read(shard, sample, record=record)
        describe = partial(self.reader.describe, shard, sample)
        if raw.mask is None:
            raise SampleError("mask", f"{describe()} has no mask")
        try:
            mask = decode_grey(raw.mask, "mask")
        except SampleError as error:
            raise SampleError("mask", f"{describe()}.{MASK} {error.reason}") from None
        height, width = record.height, record.width
        if mask.shape != (height, width):
            raise SampleError("mask", f"{describe()}: the mask does not have its image's size")
        epoch, offset = divmod(position, self.order.samples)
        views, valid = [], []
        for view in draw_views(self.order.seed, epoch, offset, height, width, self.config):
            window, is_valid = choose_window(mask, view, self.config)
            views.append(replace(view, windows=window[None]))
            valid.append(is_valid)
        return FetchedSample(
            np.frombuffer(raw.image, np.uint8),
            mask,
            (views[0], views[1]),
            (valid[0], valid[1]),
            int(self.reader.index.starts[shard]) + sample,
            describe,
        )

    def _report(self, error: SampleError, attempt: int) -> None:
        with self._lock:
            self.bad_samples += 1
            known = error.reason in self._reported or len(self._reported) > MAX_REPORTED
            last = not known and len(self._reported) == MAX_REPORTED
            if not known:
                self._reported.add(error.reason)
        if last:
            log.warning("more than %d kinds of bad samples: no more are named", MAX_REPORTED)
        elif not known:
            log.warning("bad sample replaced: %s (attempt %d)", error, attempt)
