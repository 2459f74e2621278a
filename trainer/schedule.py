"""Learning rates as a pure function of progress."""

from dataclasses import dataclass

from data_pipeline.errors import InputError


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    Attributes:
        name: sgd, or adamw.
        lr: base learning rate.
        momentum, weight_decay: of SGD; momentum is AdamW's first beta.
        beta2: AdamW's second beta.
        schedule: poly, (1 − progress)^power, or constant.
        per: progress is counted in whole epochs (as published) or in steps.
        power: of poly.
        warmup_steps: linear from 0.
        clip_norm: largest norm of the whole gradient; 0 does not clip.
        accumulate: micro-batches a step; each has its own in-batch prototypes.
    """

    name: str = "sgd"
    lr: float = 0.004
    momentum: float = 0.9
    weight_decay: float = 1e-4
    beta2: float = 0.999
    schedule: str = "poly"
    per: str = "epoch"
    power: float = 0.9
    warmup_steps: int = 0
    clip_norm: float = 0.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise InputError(f"optim.name is {self.name!r}; it can be sgd or adamw")
        if not 0 <= self.beta2 < 1:
            raise InputError(f"optim.beta2 is {self.beta2}; it must be in 0…1 (1 excluded)")
        if self.lr <= 0 or self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise InputError(
                "optim.lr must be above 0, optim.weight_decay not negative, optim.momentum in 0…1"
            )
        if self.schedule not in ("poly", "constant"):
            raise InputError(f"optim.schedule is {self.schedule!r}; it can be poly or constant")
        if self.per not in ("epoch", "step"):
            raise InputError(f"optim.per is {self.per!r}; it can be epoch or step")
        if self.accumulate < 1 or self.warmup_steps < 0 or self.clip_norm < 0:
            raise InputError(
                "optim.accumulate must be at least 1, optim.warmup_steps and optim.clip_norm not "
                "negative"
            )


def learning_rate(
    config: OptimConfig, step: int, total_steps: int, steps_per_epoch: float
) -> float:
    """The rate of step `step` of `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = step / total_steps
    if config.per == "epoch":
        total_epochs = max(1, round(total_steps / steps_per_epoch))
        progress = min(int(step / steps_per_epoch) / total_epochs, 1.0)
    return float(config.lr * (1 - progress) ** config.power)
