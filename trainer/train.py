"""Training: `torchrun --nproc-per-node=N -m trainer.train --recipe NAME key=value …`.

The same command started again goes on from the newest complete checkpoint.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from data_pipeline.files import write_json
from data_pipeline.loader import BatchStream
from trainer.batch_norm import convert_batch_norm, shuffle_rows, unshuffle_rows
from trainer.checkpoint import save_checkpoint
from trainer.config import TrainConfig, load_config, save_config
from trainer.distributed import (
    Ranks,
    all_reduce_sum,
    any_rank,
    barrier,
    cores_per_rank,
    end_ranks,
    same_on_all_ranks,
    start_ranks,
)
from trainer.encoder import initial_network
from trainer.engine import DdpEngine
from trainer.environment import describe_environment
from trainer.memory_bank import ShardedMemoryBank
from trainer.metrics import Meter, MetricsLog, peak_memory_mb, refuse_non_finite
from trainer.model import PixelEncoder, PixelOutput
from trainer.momentum import make_momentum_encoder, update_momentum
from trainer.objective import ChosenPixels, choose_pixels, contrast_views
from trainer.preemption import StopRequest
from trainer.preflight import Plan, add_arguments, plan_run
from trainer.schedule import learning_rate

logger = logging.getLogger(__name__)
_RANK_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"))  # as torchrun sets them


def train(config: TrainConfig, plan: Plan, ranks: Ranks) -> int:
    """Trains until the run is done or was asked to stop; returns the number of finished steps.

    Raises:
        InputError: shards or checkpoint cannot be read, perhaps on this rank alone.
        FloatingPointError: the loss is not finite, on every rank at the same step.
    """
    barrier(ranks)  # every rank has looked before one writes
    for warning in plan.warnings if ranks.is_main else ():
        logger.warning(warning)
    state = TrainState(config, plan, ranks)
    stream, log, stop = state.stream(), state.metrics_log(), StopRequest()
    meter, micro_batches = state.meter, config.optim.accumulate
    clock = Clock(config.data.batch_size, stream, state.seconds, state.step)
    step = state.step
    try:
        while step < plan.total_steps:
            lr = learning_rate(config.optim, step, plan.total_steps, plan.steps_per_epoch)
            update_momentum(state.momentum_encoder, state.engine.network, config.model.momentum)
            for micro in range(micro_batches):
                batch: Batch = next(stream)
                torch.manual_seed(_dropout_seed(config.run.seed, step, micro, ranks))
                chosen = state.choose_pixels(batch, step * micro_batches + micro)
                moved_pixels = state.bank.prefetch(chosen.pixels_of_ranks)
                with state.engine.accumulating(more_follow=micro + 1 < micro_batches):
                    query = state.engine.forward(batch.query_image)
                    key = embed_keys(state, batch, seed=step * micro_batches + micro)
                    losses = contrast_views(
                        query, key, batch, chosen, state.bank, ranks, config.loss
                    )
                    state.engine.backward(losses.total)
                meter.add(losses, moved_pixels)
            meter.add_norm(state.engine.step(lr))
            step += 1

            if step % config.run.log_every == 0 or step == plan.total_steps:
                row = {"step": step, "epoch": step / plan.steps_per_epoch, "lr": lr}
                meter.add_exchange(*state.exchange_since_last())
                row |= meter.means(micro_batches, config.loss) | clock.read(step, plan.total_steps)
                row |= state.describe_data(stream)
                refuse_non_finite(row)  # the same row on every rank
                if log is not None:
                    log.write(row)
            if log is not None:
                log.advance(step)
            stopping = stop.agreed(ranks)
            if step % config.run.checkpoint_every == 0 or step == plan.total_steps or stopping:
                state.seconds = clock.total_seconds
                state.save(step)
            if stopping:
                break
    finally:
        stop.close()
        stream.close()
        if log is not None:
            log.close()
    return step


class TrainState:
    """What a checkpoint holds: networks, optimizer, bank, progress."""

    def __init__(self, config: TrainConfig, plan: Plan, ranks: Ranks) -> None:
        self.config, self.plan, self.ranks = config, plan, ranks
        self.run = Path(config.run.directory)
        network = initial_network(config)
        if config.model.batch_norm == "sync":
            convert_batch_norm(network, ranks)
        network.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.momentum_encoder = make_momentum_encoder(network).train()
        self.engine = DdpEngine(network.train(), config.optim, ranks, config.run.precision)
        self.bank = ShardedMemoryBank(config.bank, config.model.embedding_dim, ranks)
        self.meter = Meter(ranks)
        self._exchange = (0.0, 0)
        self.step, self.seconds = 0, 0.0
        if plan.checkpoint is not None:
            self._load()
        elif ranks.is_main:
            save_config(config, self.run / "config.yaml")
            write_json(self.run / "environment.json", describe_environment(ranks), indent=1)

    def stream(self) -> BatchStream:
        """This rank's batches from the next step on."""
        config = self.config
        return BatchStream(
            self.plan.manifest,
            config.views,
            loader=config.data.loader,
            batch_size=config.data.batch_size // config.optim.accumulate,
            seed=config.run.seed,
            window=config.data.window,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start=self.step * config.optim.accumulate,
            threads=config.data.threads or cores_per_rank(),
            prefetch=config.data.prefetch,
            device=self.ranks.device,
        )

    def metrics_log(self) -> MetricsLog | None:
        if not self.ranks.is_main:
            return None
        total = self.plan.total_steps
        return MetricsLog(self.run, self.step, total, self.config.run.tensorboard)

    def choose_pixels(self, batch: Batch, micro_step: int) -> ChosenPixels:
        """What of this rank's part of global micro-batch `micro_step` is contrasted."""
        size = self.config.data.batch_size // self.config.optim.accumulate
        seed = self.config.run.seed
        return choose_pixels(batch, self.ranks, self.config.loss, seed, micro_step * size)

    def exchange_since_last(self) -> tuple[float, int]:
        """Seconds that this rank waited for the bank's exchange, and bytes, since the last call."""
        now = (self.bank.wait_seconds, self.bank.bytes_received)
        before, self._exchange = self._exchange, now
        return now[0] - before[0], now[1] - before[1]

    def describe_data(self, stream: BatchStream) -> dict[str, float]:
        """The bank's fill and age, and what all ranks' readers met since this start; a collective.

        Age is in steps, of the mean entry.
        """
        fetcher, bank = stream.fetcher, self.bank
        met = bank.age_sum().new_tensor([fetcher.bad_samples, fetcher.invalid_views, 0.0])
        met[2] = bank.age_sum()
        bad_samples, invalid_views, age = all_reduce_sum(met, self.ranks).tolist()
        return {
            "bank_fill": len(bank) / max(1, bank.capacity),
            "bank_age": age / max(1, len(bank)) / self.config.optim.accumulate,
            "bad_samples": int(bad_samples),
            "invalid_views": int(invalid_views),
            "memory_mb": peak_memory_mb(self.ranks.device),
        }

    def save(self, step: int) -> None:
        """Writes a checkpoint, and the encoder on its own; a collective.

        A rank that cannot write takes the others along instead of leaving them waiting.
        """
        self.meter.add_exchange(*self.exchange_since_last())
        bank, meter = self.bank.state(), self.meter.collect()
        error: OSError | SafetensorError | None = None
        if self.ranks.is_main:
            parts = {
                "model": self.engine.network.state_dict(),
                "momentum": self.momentum_encoder.state_dict(),
                "optimizer": self.engine.optimizer.state_dict(),
                "bank": bank,
                "progress": {
                    "step": step,
                    "seconds": self.seconds,
                    "data": self.plan.data_fingerprint,
                    "meter": meter,
                },
            }
            try:
                save_checkpoint(self.run, step, parts, self.config.run.keep_checkpoints)
                self._export()
            except (OSError, SafetensorError) as caught:
                error = caught
        if any_rank(error is not None, self.ranks):
            raise OSError(error or f"rank 0 could not write the checkpoint of step {step}")

    def _export(self) -> None:
        folder = self.run / "export"
        folder.mkdir(exist_ok=True)
        weights = self.engine.network.state_dict()
        temporary = folder / ".encoder.safetensors.tmp"
        save_file({name: value.contiguous() for name, value in weights.items()}, temporary)
        os.replace(temporary, folder / "encoder.safetensors")

    def _load(self) -> None:
        assert self.plan.checkpoint is not None
        load = self.plan.checkpoint.load
        self.engine.network.load_state_dict(load("model"))
        self.momentum_encoder.load_state_dict(load("momentum"))
        self.engine.optimizer.load_state_dict(load("optimizer"))
        self.bank.load_state(load("bank", in_place=True))
        progress = load("progress")
        self.step, self.seconds = int(progress["step"]), float(progress["seconds"])
        if self.ranks.is_main:
            self.meter.totals = progress["meter"].to(self.ranks.device)


class Clock:
    """Images a second and the share of time that training waits for data, between two readings.

    Args:
        batch_size: images a step, over all ranks.
        stream: whose waiting is read.
        seconds_before: of training before this start.
        step: finished steps at this start.
    """

    def __init__(
        self, batch_size: int, stream: BatchStream, seconds_before: float, step: int
    ) -> None:
        self._batch_size, self._stream, self._step = batch_size, stream, step
        self._time, self._wait = time.perf_counter(), 0.0
        self._zero = self._time - seconds_before

    @property
    def total_seconds(self) -> float:
        """Since training began, without the time between a stop and the next start."""
        return time.perf_counter() - self._zero

    def read(self, step: int, total_steps: int) -> dict[str, float]:
        now, wait = time.perf_counter(), self._stream.wait_seconds
        steps, seconds = step - self._step, max(now - self._time, 1e-9)
        speed = {
            "images_per_second": steps * self._batch_size / seconds,
            "data_wait": (wait - self._wait) / seconds,
            "eta_seconds": (total_steps - step) * seconds / steps,
            "seconds": self.total_seconds,
        }
        self._time, self._wait, self._step = now, wait, step
        return speed


@torch.no_grad()
def embed_keys(state: TrainState, batch: Batch, seed: int) -> PixelOutput:
    """The momentum encoder on the key views, its batch norm fed with shuffled images if asked."""
    encoder: PixelEncoder = state.momentum_encoder
    if state.config.model.batch_norm != "shuffle" or state.ranks.world_size == 1:
        with state.engine.autocast():
            return PixelOutput(*encoder(batch.key_image))
    images = shuffle_rows(batch.key_image, seed, state.ranks)
    with state.engine.autocast():
        shuffled = encoder(images.contiguous(memory_format=torch.channels_last))
    return PixelOutput(*(unshuffle_rows(part.float(), seed, state.ranks) for part in shuffled))


def _dropout_seed(seed: int, step: int, micro: int, ranks: Ranks) -> int:
    """Dropout depends on these numbers alone, so that a resumed run drops the same."""
    return ((seed * 1_000_003 + step) * 101 + micro) * 65_537 + ranks.rank


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trainer.train", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("trainer").setLevel(logging.INFO)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in _RANK_VARIABLES)
    try:
        with same_on_all_ranks():
            config = load_config(options.recipe, options.config, options.settings)
            plan = plan_run(config, world_size)
        ranks = start_ranks(config.run.device, config.run.timeout_seconds)
    except InputError as error:
        print(f"maskbank: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    if ranks.device.type == "cpu":
        torch.set_num_threads(config.run.threads or cores_per_rank())
    try:
        train(config, plan, ranks)
    except (InputError, OSError, FloatingPointError) as error:
        if rank == 0 or not isinstance(error, FloatingPointError):
            print(f"maskbank: rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    end_ranks()


if __name__ == "__main__":
    main()
