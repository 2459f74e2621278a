"""What do checkpoints in the background cost?

    python -m benchmarks.checkpointing [--rounds 5] [--network small] [--steps 120]

The demo's training on two ranks, with a checkpoint every 20 steps and without any, in turns. Speed
is images a second over the steps after the first 20, by the run's own clock; each round gives the
ratio of the two.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from launch.torchrun import rank_environment
from trainer.checkpoint import newest_checkpoint
from trainer.metrics import read_metrics

_NETWORKS = {
    "small": (),
    "resnet18": ("model.backbone=resnet18", "model.decoder_channels=256", "data.batch_size=16"),
}


def speed(shards: Path, run: Path, steps: int, every: int, network: str, engine: str) -> float:
    """Images a second after the first 20 steps."""
    command = [
        *(sys.executable, "-m", "launch.ranks", "--standalone", "--nproc-per-node=2"),
        *("-m", "trainer.train", "--recipe", "demo_cpu", f"data.shards={shards}"),
        *(f"run.directory={run}", f"run.steps={steps}", f"run.checkpoint_every={every}"),
        *("run.log_every=20", "run.tensorboard=false", f"engine.name={engine}"),
        *_NETWORKS[network],
    ]
    result = subprocess.run(command, env=rank_environment(2), capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    rows = read_metrics(run / "metrics.jsonl")
    first, last = rows[0], rows[-1]
    per_step = rows[0]["images_per_second"] * rows[0]["seconds"] / rows[0]["step"]
    images = round(per_step) * (last["step"] - first["step"])
    return float(images / (last["seconds"] - first["seconds"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--network", choices=sorted(_NETWORKS), default="small")
    parser.add_argument("--engine", choices=["ddp", "deepspeed"], default="ddp")
    options = parser.parse_args()
    table = Table("round", "without", "every 20 steps", "ratio")
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = folder / "shards"
        build_shards(list_scenes(400, 1, 128), shards, BuildConfig(100, "ids"), BuildOptions())
        size = 0
        for number in range(options.rounds):
            order = (10**6, 20) if number % 2 else (20, 10**6)  # neither always comes first
            found = {
                every: speed(
                    *(shards, folder / f"{number}-{every}", options.steps, every),
                    *(options.network, options.engine),
                )
                for every in order
            }
            checkpoint = newest_checkpoint(folder / f"{number}-20")
            assert checkpoint is not None
            size = sum(record.bytes for record in checkpoint.file_records().values())
            ratios.append(found[20] / found[10**6])
            table.add_row(
                str(number + 1), f"{found[10**6]:.1f}", f"{found[20]:.1f}", f"{ratios[-1]:.3f}"
            )
    Console().print(table)
    print(
        f"{options.network}, {options.engine}, {size / 1e6:.1f} MB a checkpoint: median ratio "
        f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
