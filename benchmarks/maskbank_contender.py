"""maskbank's own training loop as a contender of `benchmarks.side_by_side`.

    python -m benchmarks.maskbank_contender --shards FOLDER [--ranks 1] [--loading] [key=value …]

It is `trainer.train.main` with its watchdog, its metrics and its checkpoints; only a step's end is
paced. The settings are those of `benchmarks.stamps20`, and any key=value over them. With
--loading nothing is trained: batches are taken from the loader as fast as it makes them. With
several ranks, which torchrun starts, rank 0 speaks for all.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.contender import Ended, Paced, claim_protocol, serve
from benchmarks.stamps20 import TRAINING
from data_pipeline.loader import BatchStream
from data_pipeline.manifest import read_manifest
from trainer import train
from trainer.config import TrainConfig, load_config
from trainer.distributed import Agreed, cores_per_rank
from trainer.network_description import describe_network
from trainer.objective import Losses
from trainer.state import TrainState

RECIPE = "demo_cpu"
_FOR_EVER = 1_000_000  # seconds; standing still between two windows is no fault


class PacedState(TrainState):
    """A step ends when the driver wants the next one; on rank 0, for which the others wait.

    Attributes:
        name, loader: told to the driver; an empty loader is the one that the configuration names.
    """

    name, loader = "maskbank", ""
    _paced: Paced | None = None
    _ended = False
    _loss: torch.Tensor | None = None
    _finished = 0

    def prefetched(self) -> int:
        return _prefetched(self.config)

    def add(self, losses: Losses, moved_pixels: bool) -> None:
        super().add(losses, moved_pixels)
        self._loss = losses.total.detach()

    def finish_step(self, step: int, stop: bool) -> Agreed:
        agreed = super().finish_step(step, stop or self._ended)
        self._finished = step + 1
        if self.ranks.is_main and not agreed.stop:
            if self._paced is None:
                loader = self.loader or _loader(self.config)
                settings = describe(self.config, loader, self.prefetched())
                self._paced = Paced(self.name, settings, self.save_encoder, _root())
            try:
                loss = None if self._loss is None else float(self._loss)
                self._paced.step_done(self.config.data.batch_size, loss)
            except Ended:  # one more step, after which all ranks end as they do at any stop request
                self._ended = True
        return agreed

    def save_encoder(self, path: Path) -> None:
        """As `maskbank export` writes it; every evaluation reads it."""
        network = self.engine.network
        state = {n: value.cpu().contiguous() for n, value in network.state_dict().items()}
        save_file(state, path, describe_network(network.config, self._finished))


def train_paced(state: type[PacedState], settings: Sequence[str]) -> None:
    """`trainer.train.main` with another state."""
    train.TrainState = state  # type: ignore[misc]
    train.main(["--recipe", RECIPE, *settings])


def paced_settings(shards: Path, directory: Path, changed: Sequence[str] = ()) -> list[str]:
    """Those of `benchmarks.stamps20` with `changed` over them, for a run that may stand still."""
    return [
        *TRAINING,
        *("run.steps=1500", "run.device=cpu"),
        *(f"run.timeout_seconds={_FOR_EVER}", f"run.start_timeout_seconds={_FOR_EVER}"),
        *changed,
        *(f"data.shards={shards}", f"run.directory={directory}"),
    ]


def describe(config: TrainConfig, loader: str, prefetched: int) -> dict[str, Any]:
    """What the driver is told."""
    return {
        "loader": loader,
        "network": f"{config.model.backbone}, DeepLabV3 head",
        "views": 2,
        "size": config.views.image_size,
        "batch": config.data.batch_size,
        "precision": config.run.precision,
        "bank": config.bank.capacity,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "prefetched": prefetched,
        "training": list(TRAINING),
    }


def load_only(config: TrainConfig) -> None:
    """Batches without training, from the loader and with the threads of a run of one rank."""
    stream = BatchStream(
        read_manifest(config.data.shards),
        config.views,
        loader=config.data.loader,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        window=config.data.window,
        rank=0,
        world_size=1,
        start=0,
        threads=config.data.threads or cores_per_rank(),
        prefetch=config.data.prefetch,
        device=torch.device("cpu"),
    )

    def step() -> tuple[int, None]:
        return len(next(stream).sample_id), None

    described = describe(config, _loader(config), _prefetched(config))
    serve(step, "maskbank, loading alone", described)
    stream.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--loading", action="store_true")
    parser.add_argument("--directory", type=Path, help="of the run; a temporary one without it")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="side_by_side-") as folder:
        directory = options.directory or Path(folder) / "run"
        if options.ranks > 1 and "RANK" not in os.environ:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            ranks = [f"--nproc-per-node={options.ranks}", "-m", "benchmarks.maskbank_contender"]
            where = ["--directory", str(directory)]
            # its standard streams are ours, and become those of rank 0
            sys.exit(subprocess.call([*torchrun, *ranks, *where, *sys.argv[1:]]))
        settings = paced_settings(options.shards, directory, options.settings)
        if os.environ.get("RANK", "0") == "0":
            claim_protocol()
        if options.loading:
            load_only(load_config(RECIPE, overrides=settings))
        else:
            train_paced(PacedState, settings)


def _root() -> int:
    """torchrun, whose ranks are counted together; this process where there is one rank."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()


def _loader(config: TrainConfig) -> str:
    return f"maskbank, data.loader={config.data.loader}"


def _prefetched(config: TrainConfig) -> int:
    return config.data.prefetch + 1  # and the one that waits for a place in the queue


if __name__ == "__main__":
    main()
