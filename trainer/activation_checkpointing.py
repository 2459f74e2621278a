"""Activation checkpointing: a block's activations are computed again in the backward pass.

Only the input of each block of the backbone is kept (Chen et al., "Training Deep Nets with
Sublinear Memory Cost", 2016). Nothing that is computed changes, bit for bit; a step costs one more
forward pass of the blocks.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.specialise import specialise

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def checkpoint_blocks(network: nn.Module) -> int:
    """Makes every block of `network` forget its activations in training; returns how many do.

    In place, without changing the names of parameters and buffers. Copies are checkpointed too. In
    evaluation mode, and without gradients, a block runs as before. Blocks may have dropout, which
    drops the same again, and batch norm of any kind, also over all ranks: it repeats its
    collectives in the same order on each of them, and its running statistics are updated once.
    """
    blocks = [block for block in find_blocks(network) if not isinstance(block, _Checkpointed)]
    for block in blocks:
        specialise(block, _Checkpointed)
    return len(blocks)


def find_blocks(network: nn.Module) -> list[nn.Module]:
    """The parts that a deep network repeats: what is in its sequences and has parts itself.

    Sequences inside a block are its own affair. A network without such sequences is taken apart
    into its children.
    """
    return list(_in_sequences(network)) or [child for child in network.children() if _parts(child)]


def _in_sequences(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(module, nn.Sequential | nn.ModuleList) or isinstance(
            child, nn.Sequential | nn.ModuleList
        ):
            yield from _in_sequences(child)
        elif _parts(child):
            yield child


def _parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


class _Checkpointed(nn.Module):
    """Before the class of a block.

    At the call, not in `forward`: what torch.compile makes of a block is then inside, and hooks run
    again as well, which sharded parameters need.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().__call__(*args, **kwargs)
        return checkpoint(
            super().__call__, *args, use_reentrant=False, context_fn=self._contexts, **kwargs
        )

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around the first run, and around its repetitions."""
        return nullcontext(), _KeepStatistics(self)


class _KeepStatistics(AbstractContextManager[None]):
    """Batch norms inside a block update copies of their statistics, which are thrown away.

    Writing the values back afterwards would do too, but autograd would take that for a change of
    what it has saved. May be entered again: a graph may be run through backward twice.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._kept: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        for module in self._block.modules():
            for name in _STATISTICS:
                value = getattr(module, name, None)
                if isinstance(value, Tensor):
                    self._kept.append((module, name, value))
                    setattr(module, name, value.clone())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for module, name, value in self._kept:
            setattr(module, name, value)
        self._kept.clear()
