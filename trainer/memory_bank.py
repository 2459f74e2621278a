"""The memory bank: the last K prototypes of all ranks, a W-th of them on each rank.

Prototypes are numbered in the order in which a single queue would take them. Number s lives on rank
s mod W, in slot (s div W) mod ⌈K/W⌉ of its ring. Every rank has the batch's prototypes of all ranks
anyway, so enqueuing and evicting move nothing, the shards are equal in size for any K and W, and
where an entry is follows from its number alone: the content is that of one first-in-first-out
queue, and stays so when another number of ranks loads it.

For the loss the bank is streamed: ranks all-gather their shards chunk by chunk, from before the
encoder runs (`prefetch`), on a process group of the bank's own. Where the query pixels are fewer
bytes than the bank, they travel instead, attend to each shard where it is, and what they found
comes back.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from data_pipeline.errors import InputError
from trainer.attention import Attended, KeyChunk, KeyPart, attend_chunks, probed_rows
from trainer.bank_exchange import BankExchange, Transfer
from trainer.distributed import Ranks
from trainer.settings import BankConfig

log = logging.getLogger(__name__)
_IN_FLIGHT = 2
_FEW_ENTRIES = 4096  # so many cost a GPU next to nothing in float32 too
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def key_dtype(config: BankConfig, device: torch.device) -> torch.dtype:
    """Of the keys on that device."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    large = config.capacity > _FEW_ENTRIES
    return torch.float16 if large and device.type == "cuda" else torch.float32


class ShardedMemoryBank:
    """First-in-first-out queue of K keys, sharded over the ranks; not a module buffer.

    Every rank makes the same calls in the same order.

    Args:
        config: of the bank; its capacity need not be divisible by anything.
        dim: D.
        ranks: who shares it.

    Attributes:
        keys, sample_ids: [S, D] and int64 [S], this rank's ring of S = ⌈K/W⌉ slots.
        next_sequence: number of the next prototype; as many were ever enqueued.
        updates: times that prototypes were enqueued.
        bytes_received: by this rank, for the loss, since the bank was made.
    """

    def __init__(self, config: BankConfig, dim: int, ranks: Ranks) -> None:
        self.config, self.ranks, self.capacity = config, ranks, config.capacity
        self.slots = -(-config.capacity // ranks.world_size)
        where, dtype = ranks.device, key_dtype(config, ranks.device)
        self.keys = torch.zeros((self.slots, dim), dtype=dtype, device=where)
        self.sample_ids = torch.full((self.slots,), -1, device=where)
        self.next_sequence, self.updates, self.bytes_received = 0, 0, 0
        self._enqueued_at = torch.zeros(self.slots, dtype=torch.int32, device=where)  # update
        self._exchange = BankExchange(ranks)
        self._pending: _Gathering | None = None
        self._pixels: Sequence[int] = ()
        self._announced: set[str] = set()

    def __len__(self) -> int:
        """Valid entries over all ranks."""
        return min(self.next_sequence, self.capacity)

    # --- what a step does, in this order ---

    def prefetch(self, pixels: Sequence[int] = ()) -> bool:
        """Starts the exchange, to be called before the encoder runs; a collective.

        Args:
            pixels: query pixels of every rank in this step; without, the bank travels.

        Returns:
            Whether the pixels travel in this step, which they do after the encoder.
        """
        assert self._pending is None, "prefetch() was called twice without chunks()"
        self._pixels = pixels
        travelling = self._what_travels(max(pixels, default=0)) if pixels else "bank"
        columns = [self.keys, *([self.sample_ids] if self.config.mask_same_image else [])]
        if travelling == "bank":
            self._pending = _Gathering(self, columns)
        return travelling == "pixels"

    def parts(self, queries: Tensor, sample_ids: Tensor | None, scale: float) -> Iterator[KeyPart]:
        """The bank as the loss takes it: its chunks, or what the queries attended to elsewhere.

        Args:
            queries: this rank's [N, D], N as told to `prefetch`; detached.
            sample_ids: int64 [N].
            scale: of the logits.
        """
        if self._pending is not None or not self._pixels:
            yield from self.chunks()
        elif len(self) and max(self._pixels):
            yield self._attend_elsewhere(queries, sample_ids, scale)
        self._pixels = ()

    def chunks(self) -> Iterator[KeyChunk]:
        """Valid entries of all ranks, in an order that is the same on every rank; a collective.

        Waits for `prefetch`, which it calls itself where that was not done. While a chunk is
        consumed the next one is under way: two are in memory at a time, and the memory of a chunk
        is used again once the next is taken.
        """
        if self._pending is None:
            self.prefetch()
        assert self._pending is not None
        pending, self._pending = self._pending, None
        for columns in pending:
            yield KeyChunk(columns[0], columns[1] if len(columns) > 1 else None)

    @torch.no_grad()
    def enqueue(self, prototypes: Tensor, sample_ids: Tensor) -> None:
        """Appends the prototypes of all ranks; the oldest entries fall out. Moves nothing.

        Args:
            prototypes: [P, D], of all ranks, in the order of the ranks; the same on every rank.
            sample_ids: int64 [P].
        """
        assert self._pending is None, "enqueue() before chunks() were taken"
        ranks, count = self.ranks, len(prototypes)
        self.updates += 1
        first = max(0, count - self.capacity)  # more than the bank holds: the last ones
        first += (ranks.rank - self.next_sequence - first) % ranks.world_size
        if self.slots and first < count:
            mine = slice(first, count, ranks.world_size)
            slot = (self.next_sequence + first) // ranks.world_size
            rows = torch.arange(slot, slot + len(sample_ids[mine]), device=ranks.device)
            rows %= self.slots
            # what is no number would stay here for K prototypes; zero is at right angles to all
            self.keys[rows] = prototypes[mine].nan_to_num(0, 0, 0).to(self.keys.dtype)
            self.sample_ids[rows] = sample_ids[mine]
            self._enqueued_at[rows] = self.updates
        self.next_sequence += count

    # --- state ---

    def state(self) -> dict[str, Tensor]:
        """This rank's valid entries, by number: sequence, sample_id, update [n]; key [n, D]."""
        rows = self._valid_rows()
        sequence = self._sequences()[rows]
        order = sequence.argsort()
        return {
            "sequence": sequence[order],
            "sample_id": self.sample_ids[rows][order],
            "update": self._enqueued_at[rows][order],
            "key": self.keys[rows][order],
        }

    def counters(self) -> dict[str, int]:
        """What every rank knows of the whole bank; belongs to the entries of `state`."""
        return {
            "entries": len(self),
            "next_sequence": self.next_sequence,
            "updates": self.updates,
        }

    def load_state(self, parts: Iterable[dict[str, Tensor]], counters: dict[str, int]) -> None:
        """Takes this rank's entries of what any number of ranks saved.

        Args:
            parts: each rank's `state`, in any order.
            counters: as `counters` gave them.

        Raises:
            InputError: the keys are of another width.
        """
        self.next_sequence, self.updates = counters["next_sequence"], counters["updates"]
        renumbered = 0
        if counters["entries"] < len(self):
            # a larger bank than the saved one: as if nothing had been before the oldest entry
            renumbered = self.next_sequence - counters["entries"]
            self.next_sequence = counters["entries"]
        for part in parts:
            width = part["key"].shape[1]
            if width != self.keys.shape[1]:
                raise InputError(
                    f"the checkpoint's bank has keys of {width} numbers, the configuration's "
                    f"model.embedding_dim is {self.keys.shape[1]}"
                )
            self._take(part, part["sequence"] - renumbered)

    def _take(self, part: dict[str, Tensor], sequence: Tensor) -> None:
        mine = sequence % self.ranks.world_size == self.ranks.rank
        mine &= sequence >= self.next_sequence - self.capacity
        rows = (sequence[mine] // self.ranks.world_size % max(1, self.slots)).to(self.keys.device)
        self.keys[rows] = part["key"][mine].to(self.keys)
        self.sample_ids[rows] = part["sample_id"][mine].to(self.sample_ids)
        self._enqueued_at[rows] = part["update"][mine].to(self._enqueued_at)

    # --- diagnostics: this rank's part, to be summed over the ranks ---

    def age_sum(self) -> Tensor:
        """Age of this rank's entries in updates, summed; an entry of the last update is 1 old."""
        rows = self._valid_rows()
        ages = self.updates + 1 - self._enqueued_at[rows]
        return ages.sum(dtype=torch.float64)

    def same_sample_share(self, sample_ids: Tensor, weights: Tensor) -> Tensor:
        """Mean share of the bank's entries that are of the same sample.

        Args:
            sample_ids: int64 [n], the same on every rank.
            weights: [n], that sum to one.
        """
        if not len(self) or not len(sample_ids):
            return weights.new_zeros(())
        unique, group = torch.unique(sample_ids, return_inverse=True)
        held = self.sample_ids[self._valid_rows()]
        place = torch.searchsorted(unique, held).clamp_max(len(unique) - 1)
        matches = torch.bincount(place[unique[place] == held], minlength=len(unique))
        return (matches.to(weights.dtype)[group] * weights).sum() / len(self)

    @property
    def precision(self) -> torch.dtype | None:
        """What the loss attends in, also to other ranks' prototypes; None is the queries' own."""
        narrow = self.ranks.device.type == "cuda" and self.keys.itemsize == 2
        return torch.float16 if narrow else None

    @property
    def wait_seconds(self) -> float:
        """Time that this rank waited for the exchange, which nothing hid, since it was made."""
        return self._exchange.wait_seconds()

    # --- where entries are ---

    def _used_slots(self) -> int:
        """Slots that some rank has filled."""
        return min(self.slots, -(-self.next_sequence // self.ranks.world_size))

    def _stale(self) -> list[tuple[int, int]]:
        """(slot, rank) within the used slots that hold no valid entry: fewer than W of them."""
        ring = self.slots * self.ranks.world_size
        count = self._used_slots() * self.ranks.world_size - len(self)
        places = [(self.next_sequence + i) % ring for i in range(count)]
        return [divmod(place, self.ranks.world_size) for place in places]

    def _own_stale(self) -> list[int]:
        """Of these, this rank's slots."""
        return [slot for slot, rank in self._stale() if rank == self.ranks.rank]

    def _valid_rows(self) -> slice | Tensor:
        """This rank's slots with valid entries."""
        used = self._used_slots()
        stale = self._own_stale()
        return _without(stale, used).to(self.keys.device) if stale else slice(0, used)

    def _own_chunks(self) -> Iterator[KeyChunk]:
        """This rank's valid entries, without a copy of the whole shard."""
        used, size, stale = self._used_slots(), self.config.chunk_size, self._own_stale()
        for first in range(0, used, size):
            last = min(first + size, used)
            keys, ids = self.keys[first:last], self.sample_ids[first:last]
            if gone := [slot - first for slot in stale if first <= slot < last]:
                rows = _without(gone, last - first).to(keys.device)
                keys, ids = keys[rows], ids[rows]
            yield KeyChunk(keys, ids)

    def _sequences(self) -> Tensor:
        """Number of the entry in each of this rank's slots, int64 [S]."""
        world = self.ranks.world_size
        newest = (self.next_sequence - 1 - self.ranks.rank) // world  # turn of its newest entry
        slots = torch.arange(self.slots, device=self.keys.device)
        turn = newest - (newest - slots) % max(1, self.slots)
        return turn * world + self.ranks.rank

    # --- pixels that travel ---

    def _what_travels(self, most_pixels: int) -> str:
        world, width = self.ranks.world_size, self.keys.shape[1]
        sizes = {
            "bank": self._used_slots() * (world - 1) * self._row_bytes(),
            "pixels": (world - 1) * most_pixels * _pixel_bytes(width, self.config.mask_same_image),
        }
        chosen = self.config.move
        if chosen == "auto":
            chosen = "pixels" if sizes["pixels"] < sizes["bank"] else "bank"
        if world == 1:
            chosen = "bank"
        elif chosen not in self._announced and len(self):
            self._announced.add(chosen)
            if self.ranks.is_main:
                log.info(
                    "bank.move=%s: %s travels between the ranks in this step: %d pixels a rank, "
                    "%d entries, %d ranks; to move the pixels a rank receives %.1f MB, the bank "
                    "%.1f MB (said once for each)",
                    *(self.config.move, chosen, most_pixels, len(self), world),
                    *(sizes["pixels"] / 1e6, sizes["bank"] / 1e6),
                )
        return chosen

    def _row_bytes(self) -> int:
        """Of an entry on the wire."""
        ids = self.sample_ids.itemsize if self.config.mask_same_image else 0
        return self.keys.shape[1] * self.keys.itemsize + ids

    @torch.no_grad()
    def _attend_elsewhere(
        self, queries: Tensor, sample_ids: Tensor | None, scale: float
    ) -> Attended:
        """Every rank's queries visit every shard; memory is that of all ranks' query pixels."""
        ranks, width, most = self.ranks, queries.shape[1], max(self._pixels)
        visitors = self._exchange.gather(_padded(queries, most))
        ids = None
        if self.config.mask_same_image:
            assert sample_ids is not None
            ids = self._exchange.gather(_padded(sample_ids, most))
        found = queries.new_zeros((ranks.world_size, most, width + 2))
        for rank, count in enumerate(self._pixels):
            its_ids = None if ids is None else ids[rank, :count]
            its = attend_chunks(visitors[rank, :count], self._own_chunks(), scale, its_ids)
            found[rank, :count, :width], found[rank, :count, width] = its.mixture, its.lse
            found[rank, :count, width + 1][probed_rows(count)] = its.hardest
        returned = self._exchange.swap(found)[:, : len(queries)]
        self.bytes_received += (ranks.world_size - 1) * most * _pixel_bytes(width, ids is not None)
        merged: Attended | None = None
        for part in returned:  # in the order of the ranks, on every rank
            hardest = part[:, width + 1][probed_rows(len(queries))].contiguous()
            its = Attended(part[:, :width].contiguous(), part[:, width].contiguous(), hardest)
            if merged is None:
                merged = its
            else:
                merged.merge(its)
        assert merged is not None
        return merged


class _Gathering:
    """The shards' used slots, gathered chunk by chunk; two chunks are under way at the most.

    Iterating gives for every chunk its columns, [k, …] each, without stale entries; they hold until
    the next is taken.
    """

    def __init__(self, bank: ShardedMemoryBank, columns: list[Tensor]) -> None:
        self._bank, self._columns = bank, columns
        world, used = bank.ranks.world_size, bank._used_slots()
        self._size = size = max(1, min(bank.slots, bank.config.chunk_size // world))
        self._spans = deque((i, min(i + size, used)) for i in range(0, used, size))
        self._stale = bank._stale()
        self._under_way: deque[tuple[tuple[int, int], list[Transfer]]] = deque()
        for _ in range(_IN_FLIGHT):
            self._start_next()

    def __iter__(self) -> Iterator[list[Tensor]]:
        while self._under_way:
            span, transfers = self._under_way.popleft()
            columns = [self._bank._exchange.wait(transfer) for transfer in transfers]
            yield self._without_stale(span, columns)
            for transfer in transfers:  # the consumer is done with it
                self._bank._exchange.give_back(transfer)
            self._start_next()

    def _start_next(self) -> None:
        if not self._spans:
            return
        first, last = span = self._spans.popleft()
        exchange = self._bank._exchange
        transfers = [
            exchange.start_gather(column[first:last], self._size) for column in self._columns
        ]
        self._under_way.append((span, transfers))
        others = self._bank.ranks.world_size - 1
        size = sum(column[first:last].nbytes for column in self._columns)
        self._bank.bytes_received += others * size

    def _without_stale(self, span: tuple[int, int], columns: list[Tensor]) -> list[Tensor]:
        """Columns [W, slots, …] as [W · slots, …], less what is stale."""
        first, last = span
        gone = [
            rank * (last - first) + slot - first
            for slot, rank in self._stale
            if first <= slot < last
        ]
        flat = [column.flatten(0, 1) for column in columns]
        if not gone:
            return flat
        rows = _without(gone, len(flat[0])).to(flat[0].device)
        return [column[rows] for column in flat]


def _without(gone: list[int], count: int) -> Tensor:
    """Rows 0…count−1 less some, int64."""
    keep = torch.ones(count, dtype=torch.bool)
    keep[gone] = False
    return keep.nonzero()[:, 0]


def _padded(rows: Tensor, count: int) -> Tensor:
    """Rows [n, …] with zeros up to [count, …]."""
    padded = rows.new_zeros((count, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded


def _pixel_bytes(width: int, with_id: bool) -> int:
    """Of a query pixel on its way to one shard and back: float32 there, mixture, lse, hardest."""
    return 4 * width + 4 * (width + 2) + (8 if with_id else 0)
