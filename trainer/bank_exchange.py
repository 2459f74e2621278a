"""The collectives of the memory bank, and how long the encoder did not hide them."""

import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import Ranks, new_group

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # older torch


class Transfer(NamedTuple):
    """A collective under way, and where its result, [W, …], comes to be."""

    work: Any
    result: Tensor


class BankExchange:
    """The bank's collectives, on a process group of its own so that none waits for another's."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._group = ranks, new_group(ranks)
        self._waited = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start_gather(self, rows: Tensor) -> Transfer:
        """Rows [n, …], as many on each rank, to [W, n, …] on every rank."""
        if self._ranks.world_size == 1:
            return Transfer(None, rows[None])
        result = rows.new_empty((self._ranks.world_size, *rows.shape))
        flat = result.flatten(0, 1)
        work = _all_gather(flat, rows, group=self._group, async_op=True)
        return Transfer(work, result)

    def wait(self, transfer: Transfer, counted: bool = True) -> Tensor:
        if transfer.work is None:
            return transfer.result
        before = self._now()
        transfer.work.wait()
        if counted:
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
