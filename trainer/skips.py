"""Steps that are passed over because a loss or a gradient was no number."""

import logging
from collections.abc import Iterable

import torch
from torch import nn

from trainer.distributed import Ranks

log = logging.getLogger(__name__)
_MOST_LINES = 20  # of warnings; the count goes on in the metrics


class SkipCounter:
    """Counts skipped steps and ends the run when they do not stop.

    Args:
        limit: so many in a row end the run; 0 lets it go on.

    Attributes:
        total: since the run began.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._in_a_row = limit, 0
        self.total = 0

    def good(self) -> None:
        self._in_a_row = 0

    def bad(self, step: int, rank: int, what: str, ranks: Ranks) -> None:
        """A step was skipped.

        Args:
            step: finished steps before it.
            rank: the first whose loss or gradient was no number.
            what: "loss" or "gradient".
            ranks: of which rank 0 says so.

        Raises:
            FloatingPointError: the last `limit` steps were skipped, on every rank.
        """
        self._in_a_row += 1
        self.total += 1
        if ranks.is_main and self.total <= _MOST_LINES:
            log.warning(
                "step %d skipped: the %s of rank %d is not finite; %d so far",
                *(step + 1, what, rank, self.total),
            )
        if self._limit and self._in_a_row >= self._limit:
            raise FloatingPointError(
                f"rank {rank}: the {what} is not finite, for {self._in_a_row} steps in a row (now "
                f"step {step + 1}); lower optim.lr, set optim.clip_norm or run.precision=float32, "
                "and start the command again"
            )


class StatisticsKeeper:
    """Batch norm's running statistics as they were after the last good step.

    They are averaged on the way forward, before anybody knows that a batch was bad.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        buffers = [buffer for network in networks for buffer in network.buffers()]
        # whole-number counters and averages cannot share one fused copy
        kinds = {buffer.dtype for buffer in buffers}
        self._buffers = [[b for b in buffers if b.dtype == kind] for kind in kinds]
        self._kept = [[buffer.clone() for buffer in group] for group in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        for kept, now in zip(self._kept, self._buffers, strict=True):
            torch._foreach_copy_(kept, now)

    @torch.no_grad()
    def restore(self) -> None:
        for kept, now in zip(self._kept, self._buffers, strict=True):
            torch._foreach_copy_(now, kept)
