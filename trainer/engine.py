"""Gradients over all ranks: what the training loop needs of DDP, and nothing else of it."""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed import Ranks
from trainer.model import PixelEncoder, PixelOutput
from trainer.schedule import OptimConfig


class DdpEngine:
    """One network, its optimizer, and averaged gradients.

    Args:
        network: on its device; the engine keeps no other reference to its weights.
        config: of the optimizer.
        ranks: that share the work.
        precision: bf16 for autocast, or float32.
    """

    def __init__(
        self, network: PixelEncoder, config: OptimConfig, ranks: Ranks, precision: str
    ) -> None:
        self.network = network
        self.ranks = ranks
        self.precision = precision
        self._config = config
        self._wrapped: nn.Module = network
        self._ddp: DistributedDataParallel | None = None
        if ranks.world_size > 1:
            # broadcast_buffers would overwrite each rank's batch norm statistics with rank 0's
            with warnings.catch_warnings():  # newer torch wants a name that older torch lacks
                warnings.simplefilter("ignore", FutureWarning)
                self._ddp = DistributedDataParallel(network, broadcast_buffers=False)
            self._wrapped = self._ddp
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained, config.lr, config.momentum, weight_decay=config.weight_decay
        )

    def forward(self, images: Tensor) -> PixelOutput:
        """The network on images [B, 3, H, W], with gradient."""
        with self.autocast():
            output: PixelOutput = self._wrapped(images)
        return output

    def autocast(self) -> AbstractContextManager[None]:
        """The precision that the networks run in; losses are computed outside of it."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def accumulating(self, more_follow: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: exchange gradients only at the last."""
        if more_follow and self._ddp is not None:
            return self._ddp.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss / self._config.accumulate).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> Tensor:
        """One optimizer step; returns the norm of the gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        limit = self._config.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
