"""Metrics of a run: `metrics.jsonl`, TensorBoard, and one line on the terminal."""

import json
import logging
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from data_pipeline.files import atomic_write
from data_pipeline.progress import ETA, FittedProgress, clock
from trainer.distributed import Ranks, all_reduce_sum
from trainer.objective import Losses
from trainer.settings import LossConfig

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10.0  # where the output is a file


# What `Meter` adds up: of this rank, summed over the ranks by `collect` …
_OF_A_RANK = (
    *("contrastive", "saliency", "correct", "scored", "positive", "hardest", "same_image"),
    *("wait_seconds", "bytes"),
)
_OF_ALL_RANKS = ("prototypes", "batches", "moved_pixels", "norm")  # … and of all, by rank 0 alone


class Meter:
    """Sums of what the steps since the last log gave, on the device, without a host sync.

    `totals` is float64, in the order of the names above; a step's own sums are added to it once the
    step is accepted.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        size = len(_OF_A_RANK) + len(_OF_ALL_RANKS)
        self.totals = torch.zeros(size, dtype=torch.float64, device=ranks.device)
        self._step = torch.zeros_like(self.totals)

    def add(self, losses: Losses, moved_pixels: bool) -> None:
        """One micro-batch, and whether its pixels moved instead of the bank."""
        self._add("contrastive", losses.contrastive)
        self._add("saliency", losses.saliency)
        self._add("correct", losses.correct)
        self._add("scored", losses.scored)
        self._add("positive", losses.positive)
        self._add("hardest", losses.hardest)
        self._add("same_image", losses.same_image)
        self._add("prototypes", losses.prototypes)
        self._add("batches", 1)
        self._add("moved_pixels", moved_pixels)

    def add_exchange(self, wait_seconds: float, bytes_received: int) -> None:
        """What this rank waited for the bank's exchange, and received, since the last call."""
        self.totals[_OF_A_RANK.index("wait_seconds")] += wait_seconds
        self.totals[_OF_A_RANK.index("bytes")] += bytes_received

    def accept(self, norm: Tensor) -> None:
        """Ends a step; the gradient's norm is the same on every rank."""
        self._add("norm", norm)
        self.totals += self._step
        self._step.zero_()

    def discard(self) -> None:
        """Ends a step that is not to count."""
        self._step.zero_()

    def load(self, totals: Sequence[float]) -> None:
        """What a checkpoint held, as `collect` gave it; on rank 0."""
        self.totals = self.totals.new_tensor(totals)

    def collect(self) -> Tensor:
        """Moves all ranks' sums to rank 0 and returns them; a collective.

        Checkpoints do this too, so that a run that was stopped there adds in the same order.
        """
        collected = all_reduce_sum(self.totals.clone(), self.ranks)
        self.totals = collected if self.ranks.is_main else torch.zeros_like(collected)
        return collected.cpu()

    def means(self, accumulate: int, config: LossConfig) -> dict[str, float]:
        """Means since the last call, which starts a new interval; a collective."""
        values = self.collect().tolist()
        total = dict(zip((*_OF_A_RANK, *_OF_ALL_RANKS), values, strict=True))
        self.totals = torch.zeros_like(self.totals)
        batches, scored = max(total["batches"], 1), max(total["scored"], 1)
        loss = total["contrastive"] + config.saliency_weight * total["saliency"]
        per_rank_step = accumulate / batches / self.ranks.world_size
        return {
            "loss": loss / batches,
            "loss_contrastive": total["contrastive"] / batches,
            "loss_saliency": total["saliency"] / batches,
            "accuracy": total["correct"] / scored,
            "positive_similarity": total["positive"] / scored,
            "hardest_similarity": total["hardest"] / scored,
            "prototypes": total["prototypes"] / batches,
            "bank_same_image": total["same_image"] / batches,
            "bank_moved_pixels": total["moved_pixels"] / batches,
            "bank_mb_received": total["bytes"] * per_rank_step / 1e6,
            "bank_wait_ms": total["wait_seconds"] * per_rank_step * 1000,
            "gradient_norm": total["norm"] * accumulate / batches,
        }

    def _add(self, name: str, value: Tensor | float) -> None:
        if name in _OF_A_RANK:
            self._step[_OF_A_RANK.index(name)] += value
        elif self.ranks.is_main:
            self._step[len(_OF_A_RANK) + _OF_ALL_RANKS.index(name)] += value


class MetricsLog:
    """Writes rows of metrics; rank 0 only.

    Args:
        run: run directory.
        first_step: rows after it are from a run that was killed later, and dropped.
        total_steps: of the run, for the progress line.
        tensorboard: whether to write its files too.
    """

    def __init__(self, run: Path, first_step: int, total_steps: int, tensorboard: bool) -> None:
        self._path = run / "metrics.jsonl"
        _truncate(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._console = Console(stderr=True)
        self._last_line, self._skipped, self._online = 0.0, 0, ""
        self._progress = FittedProgress(self._console)
        self._task = self._progress.add_task("step", total=total_steps, completed=first_step)
        self._progress.start()
        self._total_steps = total_steps

    def write(self, row: dict[str, Any]) -> None:
        """One row of training; `step` counts finished steps."""
        self._record(row)
        skipped, self._skipped = row["skipped_steps"] > self._skipped, row["skipped_steps"]
        if row["prototypes"] == 0 and not skipped:
            log.warning(
                "no object in any pair of views up to step %d: check the masks, views.min_coverage "
                "and loss.min_proposal_share",
                row["step"],
            )
        self._show(row)

    def write_online(self, row: dict[str, Any]) -> None:
        """One row of an evaluation while training, which the progress line shows from then on."""
        self._record(row)
        if "kmeans_miou" in row:
            self._online = f"K-means {row['kmeans_miou']:.1f} (step {row['step']})"

    def has_online(self, step: int) -> bool:
        """Whether the network of that step has been evaluated, before this start perhaps."""
        rows = read_metrics(self._path)
        return any(row["step"] == step and "online_seconds" in row for row in rows)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _record(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def _show(self, row: dict[str, Any]) -> None:
        left, speed = row["eta_seconds"], row["images_per_second"]
        parts = [
            f"loss {row['loss']:.3f}",
            f"{speed:.{0 if speed >= 10 else 1}f} images/s",
            ETA,
            *([self._online] if self._online else []),
            f"accuracy {row['accuracy']:.1%}",
            f"data wait {row['data_wait']:.0%}",
            f"lr {row['lr']:.4g}",
            f"contrastive {row['loss_contrastive']:.3f} + saliency {row['loss_saliency']:.3f}",
            f"{row['memory_mb']:,.0f} MB",
        ]
        self._progress.update(self._task, parts=tuple(parts), ends=time.monotonic() + left)
        due = time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES
        if not self._console.is_terminal and (due or row["step"] == self._total_steps):
            self._last_line = time.monotonic()
            parts[parts.index(ETA)] = f"ETA {clock(left)}"
            print(f"step {row['step']:,}/{self._total_steps:,} · {' · '.join(parts)}", flush=True)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: of the GPU, or of this process on a CPU; MB (10⁶ bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a kill left torn is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _truncate(path: Path, first_step: int) -> None:
    rows = [row for row in read_metrics(path) if row["step"] <= first_step]
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")
