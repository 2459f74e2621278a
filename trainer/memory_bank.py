"""The memory bank: the last K prototypes of all ranks, each kept by the rank that made it.

Prototypes are numbered in the order in which a single queue would take them: step by step, within
a step by rank. Every rank knows how many each rank made (the batch's prototypes are gathered
anyway), so it knows who holds which number: enqueuing needs no communication, eviction neither, and
the union of the shards is the content of one first-in-first-out queue.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import InputError
from trainer.distributed import Ranks


class Run(NamedTuple):
    """Numbers start … start + length − 1 are held by `rank`."""

    start: int
    length: int
    rank: int


class ShardedMemoryBank:
    """First-in-first-out queue of K keys, sharded over the ranks; not a module buffer.

    Args:
        capacity: K over all ranks; need not be divisible by anything; 0 is no bank.
        dim: D.
        ranks: who shares it.
        dtype: of the keys.
    """

    def __init__(
        self, capacity: int, dim: int, ranks: Ranks, dtype: torch.dtype = torch.float32
    ) -> None:
        if capacity < 0:
            raise InputError(f"bank.capacity is {capacity}; it must not be negative")
        self.capacity = capacity
        self.ranks = ranks
        self.keys = torch.empty((0, dim), dtype=dtype, device=ranks.device)
        self.sample_ids = torch.empty(0, dtype=torch.int64, device=ranks.device)
        self.runs: deque[Run] = deque()
        self.next_sequence = 0
        self._pending: list[tuple[Any, list[Tensor]]] | None = None

    def __len__(self) -> int:
        """Valid entries over all ranks."""
        return sum(run.length for run in self.runs)

    def prefetch(self) -> None:
        """Starts gathering the shards, to be called before the encoder runs; a collective."""
        assert self._pending is None, "prefetch() was called twice without chunks()"
        self._pending = [self._start_gather(self.keys), self._start_gather(self.sample_ids)]

    def chunks(self, size: int = 1 << 16) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys [k, D] and sample ids [k] of all ranks by number, the same on every rank.

        Waits for `prefetch`, which it calls itself where that was not done.
        """
        if self._pending is None:
            self.prefetch()
        assert self._pending is not None
        gathered = []
        for work, parts in self._pending:
            if work is not None:
                work.wait()
            gathered.append(parts)
        self._pending = None
        keys, sample_ids = (self._in_order(parts) for parts in gathered)
        yield from zip(torch.split(keys, size), torch.split(sample_ids, size), strict=True)

    @torch.no_grad()
    def enqueue(self, prototypes: Tensor, sample_ids: Tensor, counts: list[int]) -> None:
        """Appends this rank's prototypes and drops what has become too old; no communication.

        Args:
            prototypes: [counts[rank], D].
            sample_ids: int64 [counts[rank]].
            counts: prototypes of every rank in this step.
        """
        assert len(prototypes) == counts[self.ranks.rank]
        self.keys = torch.cat([self.keys, prototypes.to(self.keys.dtype)])
        self.sample_ids = torch.cat([self.sample_ids, sample_ids])
        for rank, count in enumerate(counts):
            if count:
                self.runs.append(Run(self.next_sequence, count, rank))
                self.next_sequence += count
        self._evict()

    def state(self) -> dict[str, Tensor]:
        """Everything, by number, the same on every rank: sequence, sample_id, key; a collective."""
        parts = list(self.chunks()) or [(self.keys[:0], self.sample_ids[:0])]
        return {
            "sequence": torch.arange(self.next_sequence - len(self), self.next_sequence),
            "sample_id": torch.cat([ids for _, ids in parts]).cpu(),
            "key": torch.cat([keys for keys, _ in parts]).cpu(),
            "next_sequence": torch.tensor(self.next_sequence),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes this rank's part of a state that any number of ranks saved."""
        if state["key"].shape[1] != self.keys.shape[1]:
            raise InputError(
                f"the checkpoint's bank has keys of {state['key'].shape[1]} numbers, the "
                f"configuration's model.embedding_dim is {self.keys.shape[1]}"
            )
        count = len(state["key"])
        self.next_sequence = int(state["next_sequence"])
        first = self.next_sequence - count
        edges = [count * rank // self.ranks.world_size for rank in range(self.ranks.world_size + 1)]
        spans = list(itertools.pairwise(edges))
        self.runs = deque(
            Run(first + start, end - start, rank)
            for rank, (start, end) in enumerate(spans)
            if end > start
        )
        mine = slice(*spans[self.ranks.rank])
        self.keys = state["key"][mine].to(self.keys)
        self.sample_ids = state["sample_id"][mine].to(self.sample_ids)
        self._evict()

    def _evict(self) -> None:
        oldest = self.next_sequence - self.capacity
        dropped = 0
        while self.runs and self.runs[0].start < oldest:
            run = self.runs.popleft()
            gone = min(run.length, oldest - run.start)
            if run.rank == self.ranks.rank:
                dropped += gone
            if gone < run.length:
                self.runs.appendleft(Run(run.start + gone, run.length - gone, run.rank))
        self.keys, self.sample_ids = self.keys[dropped:], self.sample_ids[dropped:]

    def _held(self) -> list[int]:
        """Entries of every rank's shard."""
        held = [0] * self.ranks.world_size
        for run in self.runs:
            held[run.rank] += run.length
        return held

    def _start_gather(self, shard: Tensor) -> tuple[Any, list[Tensor]]:
        if self.ranks.world_size == 1 or not self.runs:
            return None, [shard]
        padded = shard.new_zeros((max(self._held()), *shard.shape[1:]))
        padded[: len(shard)] = shard
        parts = [torch.empty_like(padded) for _ in range(self.ranks.world_size)]
        return dist.all_gather(parts, padded, async_op=True), parts

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Gathered shards [max held, …] per rank as one tensor by number."""
        taken = [0] * self.ranks.world_size
        pieces = []
        for run in self.runs:
            pieces.append(parts[run.rank][taken[run.rank] : taken[run.rank] + run.length])
            taken[run.rank] += run.length
        return torch.cat(pieces) if pieces else parts[0][:0]
