"""The collectives of the memory bank, and how long the encoder did not hide them."""

import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import Ranks, new_group

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # older torch


class Transfer(NamedTuple):
    """A collective under way, where its result, [W, …], comes to be, and the memory behind that."""

    work: Any
    result: Tensor
    buffer: Tensor | None = None


class BankExchange:
    """The bank's collectives, on a process group of its own so that none waits for another's."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._group = ranks, new_group(ranks)
        self._spare: list[Tensor] = []
        self._waited = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start_gather(self, rows: Tensor, most: int = 0) -> Transfer:
        """Rows [n, …], as many on each rank, to [W, n, …] on every rank.

        Args:
            rows: of this rank; not to be changed until the transfer was waited for.
            most: rows that other calls like this one have; what they give back is used again.
        """
        world = self._ranks.world_size
        if world == 1:
            return Transfer(None, rows[None])
        shape = (world * max(most, len(rows)), *rows.shape[1:])
        alike = [n for n, b in enumerate(self._spare) if (b.shape, b.dtype) == (shape, rows.dtype)]
        buffer = self._spare.pop(alike[0]) if alike else rows.new_empty(shape)
        flat = buffer[: world * len(rows)]
        work = _all_gather(flat, rows, group=self._group, async_op=True)
        return Transfer(work, flat.view(world, *rows.shape), buffer)

    def give_back(self, transfer: Transfer) -> None:
        """Of a result that nothing reads any more: fresh memory at each step costs page faults."""
        if transfer.buffer is not None:
            self._spare.append(transfer.buffer)

    def wait(self, transfer: Transfer) -> Tensor:
        if transfer.work is None:
            return transfer.result
        before = self._now()
        transfer.work.wait()
        self._passed(before, self._now())
        return transfer.result

    def gather(self, rows: Tensor) -> Tensor:
        return self.wait(self.start_gather(rows))

    def swap(self, rows: Tensor) -> Tensor:
        """[W, …], the r-th for rank r, to [W, …], the r-th from rank r."""
        if self._ranks.world_size == 1:
            return rows
        result = torch.empty_like(rows)
        work = dist.all_to_all_single(result, rows, group=self._group, async_op=True)
        return self.wait(Transfer(work, result))

    def wait_seconds(self) -> float:
        for before, after in self._events:
            after.synchronize()
            self._waited += before.elapsed_time(after) / 1000
        self._events.clear()
        return self._waited

    def _now(self) -> Any:
        """A GPU waits on its own stream, so that it has to take the time there."""
        if self._ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _passed(self, before: Any, after: Any) -> None:
        if isinstance(before, float):
            self._waited += after - before
        else:
            self._events.append((before, after))
