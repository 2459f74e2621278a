"""SGD and AdamW that can pass over a step, and have their state before the first one."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.schedule import OptimConfig

STATE_NAMES = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class _Holding(torch.optim.Optimizer):
    """Mixed into an optimizer of torch.

    While `hold` is set, `step` changes no parameter and no state. It makes the state that is
    missing, as zeros, which is where SGD's momentum and AdamW's averages begin: so a checkpoint can
    be loaded before the first step, whatever an engine did to the parameters.
    """

    hold = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self.hold:
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                make_state(self, parameter)
        return None


class Sgd(_Holding, torch.optim.SGD):
    """SGD with momentum."""


class AdamW(_Holding, torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, 2019)."""


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> Sgd | AdamW:
    """The optimizer that the configuration names, over the parameters that have gradients."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    decay = config.weight_decay
    if config.name == "adamw":
        return AdamW(trained, config.lr, (config.momentum, config.beta2), weight_decay=decay)
    return Sgd(trained, config.lr, config.momentum, weight_decay=decay)


def make_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The state of a parameter, zeros where there was none."""
    state: dict[str, Any] = optimizer.state[parameter]
    adamw = isinstance(optimizer, torch.optim.AdamW)
    for name in STATE_NAMES["adamw" if adamw else "sgd"]:
        if state.get(name) is None:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    if adamw and "step" not in state:
        state["step"] = torch.tensor(0.0)
    return state
