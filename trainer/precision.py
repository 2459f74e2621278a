"""What `run.precision=auto` means on this machine."""

from dataclasses import replace
from pathlib import Path

import torch

from trainer.config import TrainConfig, load_config

AUTO = "auto"
_BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")  # x86, and Arm's


def fast_precision(device: str) -> str:
    """bf16 where the device (auto, cpu or cuda) multiplies it in hardware, else float32.

    Processors without such units emulate bf16, which takes several times as long as float32.
    """
    if device != "cpu" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # only newer versions of torch tell
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if any(capabilities.get(unit) for unit in _BF16_UNITS) else "float32"


def settle_precision(config: TrainConfig) -> TrainConfig:
    """The configuration with `run.precision=auto` as what it is here.

    A run that has begun keeps the precision that it began with, on whatever machine it continues.
    """
    if config.run.precision != AUTO:
        return config
    begun = Path(config.run.directory) / "config.yaml"
    precision = load_config(file=begun).run.precision if begun.is_file() else AUTO
    if precision == AUTO:
        precision = fast_precision(config.run.device)
    return replace(config, run=replace(config.run, precision=precision))
