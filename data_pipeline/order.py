"""Which sample when: a pure function of (sample counts, seed, position), for any number of ranks.

Positions count samples since the start of training and run on over the epochs: global batch t is
positions [t·G, (t+1)·G) and rank r of W takes its r-th part. An epoch holds every sample once.
Shards are shuffled, then the samples within a window of shards, so that reading stays local.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

_SHARDS, _SAMPLES, _SUBSTITUTES = 1, 2, 3  # streams of the generator, kept apart by its key
_CACHED_WINDOWS = 4


def generator(
    seed: int, stream: int, epoch: int, index: int = 0, part: int = 0
) -> np.random.Generator:
    """A counter-based generator: draws depend on these numbers alone.

    The lowest counter word stays free for the draws themselves (2^64 of them).
    """
    counter = np.array([0, part, index, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=counter))


class SampleOrder:
    """The order of all samples over all epochs.

    Args:
        counts: samples of each shard; empty shards are allowed.
        seed: of the shuffles, not negative.
        window: shards whose samples are mixed.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self._ends = np.cumsum(self.counts)
        self.samples = int(self.counts.sum())
        self.seed = seed
        self.window = window
        self._epoch = -1
        self._shards: Int64 = np.empty(0, np.int64)
        self._window_starts: Int64 = np.empty(0, np.int64)
        self._windows: OrderedDict[tuple[int, int], tuple[Int64, Int64]] = OrderedDict()

    def locate(self, positions: Int64) -> tuple[Int64, Int64]:
        """Shard numbers and sample numbers, int64 [n] each, at global positions int64 [n]."""
        shards, samples = np.empty_like(positions), np.empty_like(positions)
        epochs, offsets = np.divmod(positions, self.samples)
        for epoch in np.unique(epochs):
            chosen = np.flatnonzero(epochs == epoch)
            shards[chosen], samples[chosen] = self._locate_in_epoch(int(epoch), offsets[chosen])
        return shards, samples

    def substitute(self, position: int, attempt: int) -> tuple[int, int]:
        """What takes the place of a bad sample: the same on every number of ranks.

        Any sample with equal chance; touches no state, so threads may call it.
        """
        epoch, offset = divmod(position, self.samples)
        drawn = generator(self.seed, _SUBSTITUTES, epoch, offset, attempt).integers(self.samples)
        shard = int(np.searchsorted(self._ends, drawn, side="right"))
        return shard, int(drawn - self._ends[shard] + self.counts[shard])

    def next_window(self, position: int) -> list[int]:
        """Shards that are read after those which the sample at `position` is mixed with."""
        epoch, offset = divmod(position, self.samples)
        self._start_epoch(epoch)
        window = int(np.searchsorted(self._window_starts, offset, side="right"))
        shards = self._shards[window * self.window : (window + 1) * self.window]
        if not len(shards):
            shuffled = generator(self.seed, _SHARDS, epoch + 1).permutation(len(self.counts))
            shards = shuffled[: self.window]
        return [int(shard) for shard in shards]

    def _locate_in_epoch(self, epoch: int, offsets: Int64) -> tuple[Int64, Int64]:
        self._start_epoch(epoch)
        windows = np.searchsorted(self._window_starts, offsets, side="right") - 1
        shards, samples = np.empty_like(offsets), np.empty_like(offsets)
        for window in np.unique(windows):
            chosen = np.flatnonzero(windows == window)
            window_shards, window_samples = self._shuffled_window(epoch, int(window))
            inside = offsets[chosen] - self._window_starts[window]
            shards[chosen], samples[chosen] = window_shards[inside], window_samples[inside]
        return shards, samples

    def _start_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._shards = generator(self.seed, _SHARDS, epoch).permutation(len(self.counts))
        ends = np.cumsum(self.counts[self._shards])
        self._window_starts = np.concatenate([[0], ends[self.window - 1 :: self.window]])
        self._epoch = epoch

    def _shuffled_window(self, epoch: int, window: int) -> tuple[Int64, Int64]:
        found = self._windows.get((epoch, window))
        if found is not None:
            return found
        shards = self._shards[window * self.window : (window + 1) * self.window]
        counts = self.counts[shards]
        order = generator(self.seed, _SAMPLES, epoch, window).permutation(int(counts.sum()))
        first = np.cumsum(counts) - counts
        part = np.searchsorted(np.cumsum(counts), order, side="right")
        found = shards[part], order - first[part]
        self._windows[epoch, window] = found
        if len(self._windows) > _CACHED_WINDOWS:
            self._windows.popitem(last=False)
        return found


def batch_part(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and end of this rank's part of a global batch; parts differ by one at the most."""
    if batch_size < world_size:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} ranks")
    return rank * batch_size // world_size, (rank + 1) * batch_size // world_size


def batch_positions(step: int, batch_size: int, rank: int, world_size: int) -> Int64:
    """Global positions of this rank's part of global batch `step`: int64 [about batch_size / W]."""
    first, end = batch_part(batch_size, rank, world_size)
    return step * batch_size + np.arange(first, end, dtype=np.int64)
