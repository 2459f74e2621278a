"""What does a rank hold of optimizer, gradients and weights, in each stage of ZeRO?

    python -m benchmarks.zero_memory [--backbone resnet18]

AdamW on 1, 2 and 4 gloo ranks: bytes of the optimizer's state, and growth of the process's resident
memory from an empty process to after three steps.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.ranks import run_on_ranks
from trainer.deepspeed_engine import DeepSpeedEngine
from trainer.distributed import Ranks
from trainer.engine import EngineConfig, make_engine
from trainer.model import ModelConfig, PixelEncoder
from trainer.optimizer import make_state
from trainer.schedule import OptimConfig


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def measure(ranks: Ranks, stage: int | None, backbone: str) -> tuple[float, float]:
    """MB of the optimizer's state on this rank, and MB that its process grew by."""
    before = resident_mb()
    torch.manual_seed(0)
    network = PixelEncoder(ModelConfig(backbone)).train()
    config = EngineConfig() if stage is None else EngineConfig("deepspeed", stage)
    optim = OptimConfig(name="adamw")
    engine = make_engine(config, optim, network, 2 * ranks.world_size, ranks, "float32")
    images = torch.randn(2, 3, 64, 64)
    engine.rehearse(images)
    for _ in range(3):
        engine.update_momentum(0.99)
        output = engine.forward(images)
        engine.backward(output.embedding.square().mean() + output.saliency.square().mean())
        engine.gradient_is_finite()
        engine.step(1e-4)
    if isinstance(engine, DeepSpeedEngine):
        base = engine.base_optimizer
    else:
        base = engine.optimizer  # type: ignore[attr-defined]
        for parameter in network.parameters():
            make_state(base, parameter)
    tensors = [value for state in base.state.values() for value in state.values()]
    return sum(value.nbytes for value in tensors) / 1e6, resident_mb() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet18")
    options = parser.parse_args()
    table = Table("ranks", "engine", "optimizer, MB a rank", "process grew by, MB")
    for world_size in (1, 2, 4):
        for stage in (None, 0, 1, 2, 3):
            found = run_on_ranks(measure, world_size, stage, options.backbone, timeout=300)
            state, grown = (max(column) for column in zip(*found, strict=True))
            name = "DDP" if stage is None else f"ZeRO-{stage}"
            table.add_row(str(world_size), name, f"{state:.1f}", f"{grown:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
