"""Writes checkpoints while training goes on.

`start` copies this rank's part of the state and returns; a thread writes it. Once a step the ranks
tell each other whether they are still busy (`distributed.agree`); when none is, rank 0 publishes
the checkpoint, which is one rename, in the background as well. So nothing ever waits for a disk,
but for a checkpoint that is due while the one before it is still being written.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.files import write_json
from trainer.checkpoint import DESCRIPTION, VERSION, publish, temporary_folder
from trainer.distributed import Ranks
from trainer.engine import StateTensor
from trainer.tensor_file import FileRecord, write_tensors


class OtherRankFailed(OSError):
    """Another rank has failed, and says why."""


class CheckpointWriter:
    """One checkpoint at a time, written by all ranks.

    Args:
        run: run directory, which all ranks see.
        ranks: that write.
        keep, keep_every: see `checkpoint.publish`.

    Attributes:
        step: of the checkpoint under way, None where there is none.
        failure: why this rank could not write, or ''.
    """

    def __init__(self, run: Path, ranks: Ranks, keep: int, keep_every: int) -> None:
        self._run, self._ranks, self._keep = run, ranks, (keep, keep_every)
        self.step: int | None = None
        self.failure = ""
        self._publishing = False
        self._thread: threading.Thread | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}  # memory that is used again

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        step: int,
        state: Iterable[StateTensor],
        bank: dict[str, Tensor],
        description: dict[str, Any],
    ) -> None:
        """Copies the state and begins to write; no other checkpoint may be under way.

        Args:
            step: finished steps.
            state: of the engine, whole, on every rank; each part is written by one of them.
            bank: this rank's entries.
            description: progress, and what else belongs into `checkpoint.json`.
        """
        assert self.step is None, "the checkpoint before is still under way"
        self.step, self.failure = step, ""
        files: dict[str, dict[str, Tensor]] = {}
        for part, name, value in state:
            # always visited: taking a tensor may be a collective
            if self._ranks.rank == _writer_of(part, self._ranks.world_size):
                files.setdefault(part, {})[name] = self._copy(part, name, value)
        own = f"bank-{self._ranks.rank:05d}"
        files[own] = {name: self._copy(own, name, value) for name, value in bank.items()}
        self._run_in_background(lambda: self._write(step, files, description))

    def advance(self, any_busy: bool, any_failed: bool) -> None:
        """Goes on once no rank is busy; every rank is told the same.

        Raises:
            OSError: a rank could not write; what was there before is untouched.
        """
        if any_failed:
            step, self.step, self._publishing = self.step, None, False
            self.wait()
            if self._ranks.is_main and step is not None:
                shutil.rmtree(temporary_folder(self._run, step), ignore_errors=True)
            if self.failure:
                raise OSError(self.failure)
            raise OtherRankFailed(f"another rank could not write the checkpoint of step {step}")
        if self.step is None or any_busy:
            return
        if self._publishing:
            self.step, self._publishing = None, False
            return
        self._publishing = True
        if self._ranks.is_main:
            self._run_in_background(self._publish)

    def wait(self) -> None:
        """Until this rank is not busy."""
        if self._thread is not None:
            self._thread.join()

    def _copy(self, part: str, name: str, value: Tensor) -> Tensor:
        copy = self._copies.get((part, name))
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            pinned = value.device.type == "cuda"
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
            self._copies[part, name] = copy
        return copy.copy_(value.detach())

    def _run_in_background(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._guarded, args=(work,), name="checkpoint")
        self._thread.daemon = True  # a run that ends with an error does not wait for it
        self._thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # told to the other ranks, whatever it was
            self.failure = (
                f"the checkpoint of step {self.step} cannot be written ({error}); the one before "
                "it stays: free space (or mend what is wrong there) and start the same command "
                "again"
            )

    def _write(
        self, step: int, files: dict[str, dict[str, Tensor]], description: dict[str, Any]
    ) -> None:
        folder = temporary_folder(self._run, step)
        folder.mkdir(parents=True, exist_ok=True)
        records: dict[str, FileRecord] = {}
        for name, tensors in files.items():
            records[f"{name}.safetensors"] = write_tensors(folder / f"{name}.safetensors", tensors)
        # seen by rank 0 when it publishes, after every rank has said that it is done
        write_json(folder / _record_name(self._ranks.rank), records)
        if self._ranks.is_main:
            write_json(folder / DESCRIPTION, description)

    def _publish(self) -> None:
        assert self.step is not None
        folder = temporary_folder(self._run, self.step)
        records: dict[str, Any] = {}
        for rank in range(self._ranks.world_size):
            file = folder / _record_name(rank)
            records |= json.loads(file.read_text(encoding="utf-8"))
            file.unlink()
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        description |= {
            "version": VERSION,
            "world_size": self._ranks.world_size,
            "files": {name: list(record) for name, record in sorted(records.items())},
        }
        write_json(folder / DESCRIPTION, description)
        final = publish(self._run, self.step, *self._keep)
        self._export(final.path / "model.safetensors")

    def _export(self, weights: Path) -> None:
        """The encoder on its own, for other programs."""
        folder = self._run / "export"
        folder.mkdir(exist_ok=True)
        temporary = folder / ".encoder.safetensors.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(weights, temporary)  # costs nothing; not every file system can
        except OSError:
            shutil.copyfile(weights, temporary)
        os.replace(temporary, folder / "encoder.safetensors")


def _writer_of(part: str, world_size: int) -> int:
    """The rank that writes a part: far from each other, so that nodes share the work."""
    return {"model": 0, "momentum": world_size // 3, "optimizer": 2 * world_size // 3}[part]


def _record_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"
