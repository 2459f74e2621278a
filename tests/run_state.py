"""What a run came to, for comparisons bit by bit."""

from pathlib import Path

import torch

from trainer.checkpoint import newest_checkpoint


def run_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, which is to be that of `step`, by a name of its own."""
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None, f"{run} has no checkpoint"
    assert checkpoint.step == step
    found = {}
    for part in ("model", "momentum", "optimizer"):
        found |= {f"{part}.{name}": value for name, value in checkpoint.load(part).items()}
    parts = list(checkpoint.bank_parts())
    order = torch.cat([part["sequence"] for part in parts]).argsort()
    for name in parts[0]:
        found[f"bank.{name}"] = torch.cat([part[name] for part in parts])[order]
    return found
