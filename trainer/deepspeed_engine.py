"""DeepSpeed behind `engine.Engine`: the only module that imports it.

Weights, optimizer and their checkpoints go through DeepSpeed's public functions for reading and
writing a parameter's whole or local state, so that what is saved is the same as DDP's.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from data_pipeline.errors import InputError
from trainer.deepspeed_config import deepspeed_settings, zero_stage
from trainer.distributed import Ranks, all_gather_equal
from trainer.engine import GOOD_STEPS, StateTensor, autocast, network_state
from trainer.model import PixelEncoder, PixelOutput
from trainer.momentum import update_momentum
from trainer.optimizer import STATE_NAMES, build_optimizer, make_state
from trainer.schedule import OptimConfig
from trainer.settings import EngineConfig

_STEPS_TO_DOUBLE = 2000  # the loss scale of fp16, as torch's GradScaler does


def import_deepspeed(device: torch.device) -> Any:
    """The module.

    Raises:
        InputError: it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it looks for GPUs on import otherwise
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f"engine.name is deepspeed, but DeepSpeed cannot be imported ({error}); "
            "pip install 'maskbank[deepspeed]', or set engine.name=ddp"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A C++ extension for inference, which every start would compile or look for under a lock file;
    # a process that is killed meanwhile leaves the file, and all later starts wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    return deepspeed


class LossScale:
    """Of fp16: halved by a step that is no number, doubled after 2,000 in a row that are."""

    def __init__(self, value: float = 65536.0, good: int = 0) -> None:
        self.value, self.good = value, good

    def update(self, bad: bool) -> None:
        self.good = 0 if bad else self.good + 1
        if bad:
            self.value /= 2
        elif self.good == _STEPS_TO_DOUBLE:
            self.value, self.good = 2 * self.value, 0


class DeepSpeedEngine:
    """ZeRO 0 to 3. With stage 3 the momentum encoder is cut over the ranks as the network is.

    Args:
        network: on its device.
        momentum_encoder: on the same device.
        config: of the engine.
        optim: of the optimizer.
        batch_size: images a step.
        ranks: that share the work; one is enough.
        precision: of autocast.
    """

    def __init__(
        self,
        network: PixelEncoder,
        momentum_encoder: PixelEncoder,
        config: EngineConfig,
        optim: OptimConfig,
        batch_size: int,
        ranks: Ranks,
        precision: str,
    ) -> None:
        self._deepspeed = import_deepspeed(ranks.device)
        _make_group_for_one(ranks)
        self.ranks, self.precision, self._config = ranks, precision, optim
        settings = deepspeed_settings(config, optim, batch_size, ranks.world_size, precision)
        self._stage = zero_stage(settings)
        if self._stage == 3 and network.config.compile:
            raise InputError(
                "model.compile gains nothing with ZeRO 3, whose hooks break up every block; set "
                "model.compile=false, or engine.zero_stage to 2 or less"
            )
        # it flattens weights, and sends them as bytes, which channels-last ones cannot be
        network.to(memory_format=torch.contiguous_format)
        momentum_encoder.to(memory_format=torch.contiguous_format)
        self.network, self.momentum_encoder = network, momentum_encoder
        self.base_optimizer = build_optimizer(optim, network.parameters())
        self.base_optimizer.hold = True  # stage 3 takes a step when it is made
        self._engine, self.optimizer = self._initialize(network, settings, self.base_optimizer)
        self.base_optimizer.hold = False
        self._momentum_engine: Any = None
        if self._stage == 3:
            self._momentum_engine, _ = self._initialize(
                momentum_encoder, _for_inference(settings), None
            )
        self._gradient_sum: Tensor | None = None
        self._loss_scale: LossScale | None = None
        if precision == "fp16":
            self._scale_losses(LossScale())
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._look_at)  # type: ignore[no-untyped-call]

    def _initialize(self, network: nn.Module, settings: dict[str, Any], optimizer: Any) -> Any:
        engine, wrapped, _, _ = self._deepspeed.initialize(
            model=network, optimizer=optimizer, config=settings, dist_init_required=False
        )
        return engine, wrapped

    def rehearse(self, images: Tensor) -> None:
        """A held step: the optimizer's state comes to be, and DeepSpeed learns where it is."""
        self.base_optimizer.hold = True
        micro_batches = min(2, self._config.accumulate)  # adding up takes memory of its own
        for micro in range(micro_batches):
            with self.accumulating(more_follow=micro + 1 < micro_batches):
                output = self.forward(images)
                # float32, as losses are: the loss scale is infinite in float16
                nothing = 0 * (output.embedding.float().sum() + output.saliency.float().sum())
                self.backward(nothing)
        self._engine.step()
        self.base_optimizer.hold = False
        self._gradient_sum = None

    def update_momentum(self, m: float) -> None:
        if self._stage < 3:
            update_momentum(self.momentum_encoder.parameters(), self.network.parameters(), m)
            return
        pairs = zip(self.network.parameters(), self.momentum_encoder.parameters(), strict=True)
        averages, weights = [], []
        for parameter, average in pairs:
            if parameter.requires_grad:  # what is frozen is equal in both
                local = self._deepspeed.utils.safe_get_local_fp32_param(parameter)
                weights.append(local.to(self.ranks.device))
                averages.append(_partition(average)[: local.numel()])
        update_momentum(averages, weights, m)

    def forward(self, images: Tensor) -> PixelOutput:
        output: PixelOutput = self._engine(images)
        return output

    @torch.no_grad()
    def embed_keys(self, images: Tensor) -> PixelOutput:
        if self._momentum_engine is not None:
            return PixelOutput(*self._momentum_engine(images))
        with autocast(self.ranks.device, self.precision):
            return PixelOutput(*self.momentum_encoder(images))

    def accumulating(self, more_follow: bool) -> AbstractContextManager[None]:
        """Says which micro-batch is the last; DeepSpeed's own count would be a second truth."""
        self._engine.set_gradient_accumulation_boundary(not more_follow)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        if self._stage == 0 and self._loss_scale is not None:
            loss = loss * self._loss_scale.value
        self._engine.backward(loss)

    def gradient_is_finite(self) -> bool:
        seen, self._gradient_sum = self._gradient_sum, None
        return seen is None or bool(torch.isfinite(seen))

    def step(self, lr: float, skip: bool = False) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._norm_of_unwrapped()
        self.base_optimizer.hold = skip
        self._engine.step()
        self.base_optimizer.hold = False
        if self._loss_scale is not None:
            self._loss_scale.update(bad=skip)
            self._scale_losses(self._loss_scale)
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.ranks.device)

    def state(self) -> Iterator[StateTensor]:
        yield from self._weights(self.network, "model")
        yield from self._weights(self.momentum_encoder, "momentum")
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            for kind in STATE_NAMES[self._config.name]:
                yield StateTensor("optimizer", f"{kind}.{name}", self._get(parameter, kind))
            if self._config.name == "adamw":
                yield StateTensor("optimizer", f"step.{name}", self._steps().clone())
        if self._loss_scale is not None:
            yield StateTensor("optimizer", "loss_scale", torch.tensor(self._loss_scale.value))
            yield StateTensor("optimizer", GOOD_STEPS, torch.tensor(float(self._loss_scale.good)))

    def load_optimizer(self, read: Callable[[str], Tensor | None]) -> None:
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            for kind in STATE_NAMES[self._config.name]:
                saved = read(f"{kind}.{name}")
                if saved is not None:
                    self._set(parameter, kind, saved.to(self.ranks.device))
            steps = read(f"step.{name}")
            if steps is not None and self._config.name == "adamw":
                for state in self.base_optimizer.state.values():
                    state["step"].copy_(steps)
        scale, good = read("loss_scale"), read(GOOD_STEPS)
        if self._loss_scale is not None and scale is not None:
            self._scale_losses(LossScale(float(scale), 0 if good is None else int(good)))

    # --- one parameter's state, wherever ZeRO has put it ---

    def _weights(self, network: nn.Module, part: str) -> Iterator[StateTensor]:
        if self._stage < 3:
            yield from network_state(network, part)
            return
        for name, parameter in network.named_parameters():
            # its own gathering would round to what autocast computes in
            local = _partition(parameter).to(self.ranks.device)
            shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
            whole = all_gather_equal(local, self.ranks)[: shape.numel()]
            yield StateTensor(part, name, whole.view(shape))
        saved = network.state_dict().keys()  # which leaves out what is made with the network
        for name, buffer in network.named_buffers():
            if name in saved:
                yield StateTensor(part, name, buffer)

    def _get(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if self._stage == 0:
            value: Tensor = make_state(self.base_optimizer, parameter)[kind]
            return value
        found = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
        assert found is not None, kind
        whole: Tensor = found
        return whole

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        utils = self._deepspeed.utils
        if self._stage == 0:
            make_state(self.base_optimizer, parameter)[kind].copy_(value)
        elif self._stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value, kind)
        else:
            # its own function for whole states fails where they do not divide evenly
            size = _partition(parameter).numel()
            flat = value.new_zeros(size * self.ranks.world_size)
            flat[: value.numel()] = value.flatten()
            mine = flat[size * self.ranks.rank :][:size]
            utils.safe_set_local_optimizer_state(parameter, mine, kind)

    def _steps(self) -> Tensor:
        return next(
            (state["step"] for state in self.base_optimizer.state.values()), torch.tensor(0.0)
        )

    def _look_at(self, gradient: Tensor) -> None:
        """A sum is a number only if all of its parts are."""
        total = gradient.detach().float().sum()
        self._gradient_sum = total if self._gradient_sum is None else self._gradient_sum + total

    def _scale_losses(self, scale: LossScale) -> None:
        """From now on.

        DeepSpeed's own scaler under autocast is never lowered by a step that overflows, and clips
        gradients that are still scaled.
        """
        self._loss_scale = scale
        if self._stage == 0:
            self._engine.torch_autocast_z0_gradscaler = None
        else:
            self.optimizer.torch_autocast_gradscaler = None
            self.optimizer.override_loss_scale(scale.value)

    def _norm_of_unwrapped(self) -> Tensor | None:
        """Stage 0 is torch's optimizer, of which DeepSpeed knows neither norm nor loss scale."""
        if self._stage > 0:
            return None
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        if self._loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self._loss_scale.value)
        return nn.utils.get_total_norm(gradients)


def _make_group_for_one(ranks: Ranks) -> None:
    """DeepSpeed wants torchrun's variables and a process group also where there is one rank."""
    os.environ.setdefault("LOCAL_RANK", str(ranks.device.index or 0))
    if not dist.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        device = ranks.device if backend == "nccl" else None
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, device_id=device)


def _partition(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter under stage 3, flat, as long on every rank."""
    local: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
    return local


def _for_inference(settings: dict[str, Any]) -> dict[str, Any]:
    """Of the momentum encoder: no optimizer, and every weight where it can be averaged in parts."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    kept = ("train_micro_batch_size_per_gpu", "torch_autocast", "steps_per_print")
    return {**{key: settings[key] for key in kept if key in settings}, "zero_optimization": zero}
