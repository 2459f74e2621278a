"""What the training loop needs of DDP or DeepSpeed, and nothing else of them.

An engine owns the network, its momentum encoder, the optimizer and how all of them are spread over
the ranks. Weights are float32 in either; autocast runs the networks in 16 bits.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.compilation import compile_network
from trainer.distributed import Ranks
from trainer.model import PixelEncoder, PixelOutput
from trainer.momentum import make_momentum_encoder, update_momentum
from trainer.optimizer import build_optimizer, make_state
from trainer.schedule import OptimConfig
from trainer.settings import EngineConfig

GOOD_STEPS = "loss_scale_good_steps"  # in a row, after which fp16's loss scale is doubled
_DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class StateTensor(NamedTuple):
    """One tensor of an engine's state: part is model, momentum or optimizer."""

    part: str
    name: str
    value: Tensor


class Engine(Protocol):
    """Both engines; every rank makes the same calls in the same order.

    Attributes:
        network: with gradients.
        momentum_encoder: the key views'.
    """

    network: PixelEncoder
    momentum_encoder: PixelEncoder

    def rehearse(self, images: Tensor) -> None:
        """A step on `images` that changes nothing, so that all later ones are alike."""

    def update_momentum(self, m: float) -> None:
        """The momentum encoder follows the network, by 1 − m of the way."""

    def forward(self, images: Tensor) -> PixelOutput:
        """The network on images [B, 3, H, W], with gradient."""

    def embed_keys(self, images: Tensor) -> PixelOutput:
        """The momentum encoder on images [B, 3, H, W], without gradient."""

    def accumulating(self, more_follow: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: exchange gradients only at the last."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's loss."""

    def gradient_is_finite(self) -> bool:
        """Whether this rank has seen numbers only since the last step."""

    def step(self, lr: float, skip: bool = False) -> Tensor:
        """One optimizer step, or none; returns the gradient's norm before clipping."""

    def state(self) -> Iterator[StateTensor]:
        """All of model, momentum encoder and optimizer, float32, whole, on every rank in turn.

        A tensor may be gone when the next one is taken.
        """

    def load_optimizer(self, read: Callable[[str], Tensor | None]) -> None:
        """Takes the optimizer's state; `read` gives a tensor by the name that `state` gave it."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The precision that the networks run in; losses are computed outside of it."""
    dtype = _DTYPES[precision]
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def network_state(network: nn.Module, part: str) -> Iterator[StateTensor]:
    """Parameters and buffers under the names of `state_dict`."""
    for name, value in network.state_dict().items():
        yield StateTensor(part, name, value)


class DdpEngine:
    """Every rank holds everything; gradients are averaged while backward runs.

    Args:
        network: on its device; the engine keeps no other reference to its weights.
        momentum_encoder: on the same device.
        config: of the optimizer.
        ranks: that share the work.
        precision: of autocast.
    """

    def __init__(
        self,
        network: PixelEncoder,
        momentum_encoder: PixelEncoder,
        config: OptimConfig,
        ranks: Ranks,
        precision: str,
    ) -> None:
        self.network, self.momentum_encoder = network, momentum_encoder
        self.ranks, self.precision, self._config = ranks, precision, config
        self._wrapped: nn.Module = network
        self._ddp: DistributedDataParallel | None = None
        if ranks.world_size > 1:
            # broadcast_buffers would overwrite each rank's batch norm statistics with rank 0's
            with warnings.catch_warnings():  # newer torch wants a name that older torch lacks
                warnings.simplefilter("ignore", FutureWarning)
                self._ddp = DistributedDataParallel(network, broadcast_buffers=False)
            self._wrapped = self._ddp
        self.optimizer = build_optimizer(config, network.parameters())
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16")
        self._norm: Tensor | None = None

    def rehearse(self, images: Tensor) -> None:
        """DDP orders its buckets anew after the first step, and sums in another order from then on.

        Without a rehearsal the first step after a resume would therefore differ in its last bits.
        It also finds out before hours are spent whether a batch fits the memory.
        """
        output = self.forward(images)
        nothing = 0 * (output.embedding.sum() + output.saliency.sum())
        nothing.backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad(set_to_none=True)

    def update_momentum(self, m: float) -> None:
        update_momentum(self.momentum_encoder.parameters(), self.network.parameters(), m)

    def forward(self, images: Tensor) -> PixelOutput:
        with autocast(self.ranks.device, self.precision):
            output: PixelOutput = self._wrapped(images)
        return output

    @torch.no_grad()
    def embed_keys(self, images: Tensor) -> PixelOutput:
        with autocast(self.ranks.device, self.precision):
            return PixelOutput(*self.momentum_encoder(images))

    def accumulating(self, more_follow: bool) -> AbstractContextManager[None]:
        if more_follow and self._ddp is not None:
            return self._ddp.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss / self._config.accumulate).backward()  # type: ignore[no-untyped-call]

    def gradient_is_finite(self) -> bool:
        """The gradient is the same on every rank by now, and is clipped on the way."""
        self._scaler.unscale_(self.optimizer)
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        self._norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._config.clip_norm:  # which goes over all gradients once more
            nn.utils.clip_grads_with_norm_(parameters, self._config.clip_norm, self._norm)
        return bool(torch.isfinite(self._norm))

    def step(self, lr: float, skip: bool = False) -> Tensor:
        assert self._norm is not None, "step() before gradient_is_finite()"
        norm, self._norm = self._norm, None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not skip:
            self.optimizer.step()
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> Iterator[StateTensor]:
        yield from network_state(self.network, "model")
        yield from network_state(self.momentum_encoder, "momentum")
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                for kind, value in make_state(self.optimizer, parameter).items():
                    yield StateTensor("optimizer", f"{kind}.{name}", value)
        if self._scaler.is_enabled():
            good = float(self._scaler.state_dict()["_growth_tracker"])
            yield StateTensor("optimizer", "loss_scale", torch.tensor(self._scaler.get_scale()))
            yield StateTensor("optimizer", GOOD_STEPS, torch.tensor(good))

    def load_optimizer(self, read: Callable[[str], Tensor | None]) -> None:
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                for kind, value in make_state(self.optimizer, parameter).items():
                    saved = read(f"{kind}.{name}")
                    if saved is not None:
                        value.copy_(saved)
        scale, good = read("loss_scale"), read(GOOD_STEPS)
        if self._scaler.is_enabled() and scale is not None:
            count = 0 if good is None else int(good)
            self._scaler = torch.amp.GradScaler(self.ranks.device.type)
            begun = {"scale": float(scale), "_growth_tracker": count}
            self._scaler.load_state_dict({**self._scaler.state_dict(), **begun})


def make_engine(
    config: EngineConfig,
    optim: OptimConfig,
    network: PixelEncoder,
    batch_size: int,
    ranks: Ranks,
    precision: str,
    momentum_state: dict[str, Tensor] | None = None,
) -> Engine:
    """The engine that the configuration names, over a network in training mode.

    Args:
        config: of the engine.
        optim: of the optimizer.
        network: on its device.
        batch_size: images a step, over all ranks.
        ranks: that share the work.
        precision: of autocast.
        momentum_state: of the momentum encoder; it starts as the network does without.

    Raises:
        InputError: DeepSpeed is not installed, or its file contradicts the configuration.
    """
    momentum_encoder = make_momentum_encoder(network)
    if momentum_state is not None:
        momentum_encoder.load_state_dict(momentum_state)
    momentum_encoder.train()
    if network.config.compile:
        compile_network(network)
        compile_network(momentum_encoder)
    if config.name == "ddp":
        return DdpEngine(network, momentum_encoder, optim, ranks, precision)
    from trainer.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(network, momentum_encoder, config, optim, batch_size, ranks, precision)
