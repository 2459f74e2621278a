"""What do checkpoints in the background cost?

    python -m benchmarks.checkpointing [--pairs 10] [--network small] [--engine ddp]

The demo's training on two ranks, with a checkpoint every 40 steps. Speed is logged every 20 steps:
every other window of 20 steps holds one checkpoint, copying and writing, as it would with one every
20 steps, and the window after it holds none. Pairs of neighbouring windows of one run are compared,
since the speed of the machine drifts more than a checkpoint costs.
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


def windows(run: Path, shards: Path, pairs: int, network: str, engine: str) -> list[float]:
    """Images a second of each 20 steps, but for the first 40."""
    command = [
        *(sys.executable, "-m", "launch.ranks", "--standalone", "--nproc-per-node=2"),
        *("-m", "trainer.train", "--recipe", "demo_cpu", f"data.shards={shards}"),
        *(f"run.directory={run}", f"run.steps={40 * (pairs + 1)}", "run.checkpoint_every=40"),
        *("run.log_every=20", "run.tensorboard=false", f"engine.name={engine}"),
        *_NETWORKS[network],
    ]
    result = subprocess.run(command, env=rank_environment(2), capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return [row["images_per_second"] for row in read_metrics(run / "metrics.jsonl")][2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--network", choices=sorted(_NETWORKS), default="small")
    parser.add_argument("--engine", choices=["ddp", "deepspeed"], default="ddp")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = BuildConfig(100, "ids")
        build_shards(list_scenes(400, 1, 128), folder / "shards", config, BuildOptions())
        where = (folder / "run", folder / "shards")
        found = windows(*where, options.pairs, options.network, options.engine)
        checkpoint = newest_checkpoint(folder / "run")
        assert checkpoint is not None
        size = sum(record.bytes for record in checkpoint.file_records().values())
    table = Table("pair", "with a checkpoint, images/s", "without", "ratio")
    ratios = []
    for number in range(options.pairs):
        busy, idle = found[2 * number], found[2 * number + 1]
        ratios.append(busy / idle)
        table.add_row(str(number + 1), f"{busy:.1f}", f"{idle:.1f}", f"{ratios[-1]:.3f}")
    Console().print(table)
    print(
        f"{options.network}, {options.engine}, {size / 1e6:.1f} MB a checkpoint: median ratio "
        f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
