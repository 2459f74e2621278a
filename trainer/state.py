"""What a run is made of between two steps, and how it is saved and found again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.files import write_json
from data_pipeline.loader import BatchStream
from data_pipeline.order import batch_part
from trainer.batch_norm import convert_batch_norm, shuffle_rows, unshuffle_rows
from trainer.checkpoint import Checkpoint
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import TrainConfig, save_config
from trainer.distributed import Agreed, Ranks, agree, all_reduce_sum, cores_per_rank
from trainer.encoder import initial_network
from trainer.engine import Engine, make_engine
from trainer.environment import describe_environment
from trainer.memory_bank import ShardedMemoryBank
from trainer.metrics import Meter, MetricsLog, peak_memory_mb
from trainer.model import PixelEncoder, PixelOutput
from trainer.objective import ChosenPixels, Losses, choose_pixels
from trainer.preflight import Plan
from trainer.schedule import learning_rate
from trainer.skips import SkipCounter, StatisticsKeeper


@dataclass(frozen=True)
class Position:
    """A micro-batch within the run.

    Attributes:
        step: finished steps before it.
        micro: its number within the step.
        micro_steps: micro-batches before it since the run began.
        first_image: of this rank's part, in the endless order of samples.
    """

    step: int
    micro: int
    micro_steps: int
    first_image: int


class TrainState:
    """Networks, optimizer, bank and progress of one rank.

    Args:
        config: of the run.
        plan: what preflight found.
        checkpoint: to go on from, already checked; None starts anew.
        ranks: that train.
    """

    def __init__(
        self, config: TrainConfig, plan: Plan, checkpoint: Checkpoint | None, ranks: Ranks
    ) -> None:
        self.config, self.plan, self.ranks = config, plan, ranks
        self.run = Path(config.run.directory)
        self.micro_batch_size = config.data.batch_size // config.optim.accumulate
        self._parts = [
            batch_part(self.micro_batch_size, rank, ranks.world_size)
            for rank in range(ranks.world_size)
        ]
        self.engine = self._make_engine(checkpoint)
        self.bank = ShardedMemoryBank(config.bank, config.model.embedding_dim, ranks)
        self.meter = Meter(ranks)
        self.skips = SkipCounter(config.run.max_skipped)
        self._statistics = StatisticsKeeper((self.engine.network, self.engine.momentum_encoder))
        self._rehearse()
        self._exchange = (0.0, 0)
        self._loss_sum = torch.zeros((), device=ranks.device)
        self.step, self.seconds = 0, 0.0
        if checkpoint is not None:
            self._load(checkpoint)
        elif ranks.is_main:
            save_config(config, self.run / "config.yaml")
            write_json(self.run / "environment.json", describe_environment(ranks), indent=1)
        self.writer = CheckpointWriter(
            self.run, ranks, config.run.keep_checkpoints, config.run.keep_every
        )

    # --- what the loop asks for ---

    def stream(self) -> BatchStream:
        """This rank's batches from the next step on."""
        config = self.config
        return BatchStream(
            self.plan.manifest,
            config.views,
            loader=config.data.loader,
            batch_size=self.micro_batch_size,
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

    def lr(self, step: int) -> float:
        plan = self.plan
        return learning_rate(self.config.optim, step, plan.total_steps, plan.steps_per_epoch)

    def begin(self, step: int, micro: int) -> Position:
        """Where a micro-batch is; draws of dropout depend on that alone, so a resumed run drops
        the same."""
        seed = (self.config.run.seed * 1_000_003 + step) * 101 + micro
        torch.manual_seed(seed * 65_537 + self.ranks.rank)
        micro_steps = step * self.config.optim.accumulate + micro
        first = micro_steps * self.micro_batch_size + self._parts[self.ranks.rank][0]
        return Position(step, micro, micro_steps, first)

    def choose_pixels(self, batch: Batch, at: Position) -> ChosenPixels:
        """What of this rank's part of a global micro-batch is contrasted."""
        config = self.config
        return choose_pixels(batch, self.ranks, config.loss, config.run.seed, at.first_image)

    def embed_keys(self, batch: Batch, at: Position) -> PixelOutput:
        """The momentum encoder on the key views; its batch norm sees shuffled images if asked."""
        if self.config.model.batch_norm != "shuffle" or self.ranks.world_size == 1:
            return self.engine.embed_keys(batch.key_image)
        counts = [end - first for first, end in self._parts]
        seed = at.micro_steps
        images = shuffle_rows(batch.key_image, seed, counts, self.ranks)
        shuffled = self.engine.embed_keys(images.contiguous(memory_format=torch.channels_last))
        return PixelOutput(
            *(unshuffle_rows(part.float(), seed, counts, self.ranks) for part in shuffled)
        )

    def add(self, losses: Losses, moved_pixels: bool) -> None:
        """Counts a micro-batch, which `finish_step` accepts or passes over."""
        self._loss_sum = self._loss_sum + losses.total.detach()
        self.meter.add(losses, moved_pixels)

    def finish_step(self, step: int, stop: bool) -> Agreed:
        """The optimizer's step, unless any rank's loss or gradient is no number.

        Then the step leaves no trace but its number: weights, optimizer, batch norm statistics and
        metrics stay, and the run goes on with the next batch.

        Raises:
            FloatingPointError: that was so too often in a row.
            OSError: a rank could not write the checkpoint that was under way.
        """
        finite = self.engine.gradient_is_finite()
        bad = "" if finite else "gradient"
        if not torch.isfinite(self._loss_sum):
            bad = "loss"
        self._loss_sum = torch.zeros((), device=self.ranks.device)
        agreed = agree(self.ranks, stop, bad, self.writer.busy, bool(self.writer.failure))
        norm = self.engine.step(self.lr(step), skip=bool(agreed.bad))
        if agreed.bad:
            self._statistics.restore()
            self.meter.discard()
            self.skips.bad(step, agreed.bad_rank, agreed.bad, self.ranks)
        else:
            self._statistics.keep()
            self.meter.accept(norm)
            self.skips.good()
        self.writer.advance(agreed.saving, agreed.save_failed)
        return agreed

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
            "skipped_steps": self.skips.total,
            "memory_mb": peak_memory_mb(self.ranks.device),
        }

    def add_exchange(self) -> None:
        """Moves what the bank's exchange cost since the last call into the metrics."""
        now = (self.bank.wait_seconds, self.bank.bytes_received)
        before, self._exchange = self._exchange, now
        self.meter.add_exchange(now[0] - before[0], now[1] - before[1])

    # --- checkpoints ---

    def save(self, step: int) -> None:
        """Begins a checkpoint, once the one before it is written; a collective.

        Raises:
            OSError: a rank could not write the one before it.
        """
        self.finish_saving()
        self.add_exchange()
        progress = {
            "step": step,
            "seconds": self.seconds,
            "data": self.plan.data_fingerprint,
            "meter": self.meter.collect().tolist(),
            "skipped": self.skips.total,
            "bank": self.bank.counters(),
        }
        description = {"engine": self.config.engine.name, "progress": progress}
        self.writer.start(step, self.engine.state(), self.bank.state(), description)

    def finish_saving(self) -> None:
        """Waits until no checkpoint is under way; a collective.

        Raises:
            OSError: a rank could not write it.
        """
        while self.writer.step is not None:
            self.writer.wait()
            failed = bool(self.writer.failure)
            agreed = agree(self.ranks, False, "", self.writer.busy, failed)
            self.writer.advance(agreed.saving, agreed.save_failed)

    def _make_engine(self, checkpoint: Checkpoint | None) -> Engine:
        config, ranks = self.config, self.ranks
        network = PixelEncoder(config.model) if checkpoint else initial_network(config)
        momentum_state: dict[str, Tensor] | None = None
        if checkpoint is not None:
            # before the engine cuts the weights over the ranks
            network.load_state_dict(checkpoint.load("model"))
            momentum_state = checkpoint.load("momentum")
        if config.model.batch_norm == "sync":
            convert_batch_norm(network, ranks)
        network.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return make_engine(
            config.engine,
            config.optim,
            network.train(),
            self.micro_batch_size * config.optim.accumulate,
            ranks,
            config.run.precision,
            momentum_state,
        )

    def _rehearse(self) -> None:
        size = self.config.views.image_size
        first, end = self._parts[self.ranks.rank]
        images = torch.zeros((end - first, 3, size, size), device=self.ranks.device)
        self.engine.rehearse(images.contiguous(memory_format=torch.channels_last))
        self._statistics.restore()

    def _load(self, checkpoint: Checkpoint) -> None:
        self.engine.load_optimizer(checkpoint.reader("optimizer"))
        progress: dict[str, Any] = checkpoint.describe()["progress"]
        self.bank.load_state(checkpoint.bank_parts(), progress["bank"])
        self.step, self.seconds = int(progress["step"]), float(progress["seconds"])
        self.skips.total = int(progress["skipped"])
        if self.ranks.is_main:
            self.meter.load(progress["meter"])
