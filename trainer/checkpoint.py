"""Checkpoints on disk: complete and whole, or passed over; nothing in them is ever unpickled.

    checkpoints/step-00001000/
        model.safetensors momentum.safetensors optimizer.safetensors   whole tensors by name
        bank-00000.safetensors …                                       each rank's entries
        checkpoint.json      progress, and bytes and SHA-256 of every file
        COMPLETE             SHA-256 of checkpoint.json, written last

They do not depend on the engine or on the number of ranks that wrote them.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write, sync_directory
from trainer.tensor_file import FileRecord, check_file

log = logging.getLogger(__name__)
COMPLETE, DESCRIPTION, VERSION = "COMPLETE", "checkpoint.json", 2
FOLDER = "checkpoints"
_DAMAGED = ".damaged"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; whether it is whole, `problem` says."""

    path: Path
    step: int

    def describe(self) -> dict[str, Any]:
        """`checkpoint.json`: version, world_size, engine, progress, and files.

        Raises:
            InputError: it is missing, damaged, or of another version.
        """
        file = self.path / DESCRIPTION
        try:
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest() != (self.path / COMPLETE).read_text().strip():
                raise ValueError(f"its checksum is not that in {COMPLETE}")
            value = json.loads(data)
            version = value["version"]
            for name, record in value["files"].items():
                if Path(name).name != name or len(record) != 2:
                    raise ValueError(f"{name!r} is no file name")
            progress: dict[str, Any] = value["progress"]
            int(progress["step"])
        except OSError as error:
            raise self._unreadable(file, error.strerror or str(error)) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._unreadable(file, f"{type(error).__name__}: {error}") from None
        if version != VERSION:
            raise self._unreadable(file, f"version {version}, this maskbank reads {VERSION}")
        return dict(value)

    def file_records(self) -> dict[str, FileRecord]:
        """Every file but the description itself."""
        files = self.describe()["files"]
        return {name: FileRecord(int(size), str(sha)) for name, (size, sha) in files.items()}

    def problem(self, mine: Callable[[int], bool] = lambda number: True) -> str:
        """What is wrong with it, or ''; reads all bytes of the files whose number is `mine`."""
        try:
            records = self.file_records()
        except InputError as error:
            return str(error)
        for number, (name, record) in enumerate(sorted(records.items())):
            if mine(number) and (wrong := check_file(self.path / name, record)):
                return f"{self.path / name} {wrong}"
        return ""

    def names(self, part: str) -> list[str]:
        """Of the tensors of a part, such as `model`."""
        with self._open(part) as file:
            return list(file.keys())

    def load(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part, such as `model`, on the CPU.

        Raises:
            InputError: the file is missing or damaged.
        """
        with self._open(part) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def reader(self, part: str) -> Callable[[str], Tensor | None]:
        """Reads one tensor of a part at a time, None where it has none of that name."""
        file = self._open(part).__enter__()
        known = set(file.keys())
        return lambda name: file.get_tensor(name) if name in known else None

    def bank_parts(self) -> Iterator[dict[str, Tensor]]:
        """What each rank held of the memory bank when this was written."""
        for name in sorted(self.file_records()):
            if name.startswith("bank-"):
                yield self.load(name.removesuffix(".safetensors"))

    def _open(self, part: str) -> Any:
        path = self.path / f"{part}.safetensors"
        try:
            return safe_open(path, "pt")
        except Exception as error:  # OSError, or safetensors' own, on damaged bytes
            raise self._unreadable(path, str(error).splitlines()[0][:200]) from None

    def _unreadable(self, file: Path, reason: str) -> InputError:
        return InputError(
            f"{file} cannot be read ({reason}); delete {self.path} to go on from the one before"
        )


def complete_checkpoints(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run directory, oldest first."""
    found = []
    for marker in (run / FOLDER).glob(f"step-*/{COMPLETE}"):
        number = marker.parent.name.removeprefix("step-")
        if number.isdigit():
            found.append(Checkpoint(marker.parent, int(number)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run directory that is whole; says what it passes over."""
    for checkpoint in reversed(complete_checkpoints(run)):
        problem = checkpoint.problem()
        if not problem:
            return checkpoint
        log.warning("checkpoint of step %d passed over: %s", checkpoint.step, problem)
    return None


def set_aside(checkpoint: Checkpoint) -> None:
    """Takes a damaged checkpoint out of the way, but keeps it to be looked at."""
    target = checkpoint.path.with_name(checkpoint.path.name + _DAMAGED)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(checkpoint.path, target)


def temporary_folder(run: Path, step: int) -> Path:
    """Where a checkpoint is written before it is published."""
    return run / FOLDER / f".step-{step:08d}.tmp"


def remove_leftovers(run: Path) -> None:
    """Deletes what a killed run was writing; one process, before any writes."""
    for path in (run / FOLDER).glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def publish(run: Path, step: int, keep: int, keep_every: int) -> Checkpoint:
    """Renames what all ranks have written, marks it complete, and drops old ones.

    Args:
        run: run directory.
        step: of the checkpoint.
        keep: newest ones that stay.
        keep_every: those of every so many steps stay too; 0 for none.

    Raises:
        OSError: as on a full disk; what was there before is untouched.
    """
    temporary = temporary_folder(run, step)
    final = run / FOLDER / f"step-{step:08d}"
    sync_directory(temporary)
    if final.exists():  # an earlier one that was never marked complete
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync_directory(final.parent)
    with atomic_write(final / COMPLETE) as file:
        digest = hashlib.sha256((final / DESCRIPTION).read_bytes()).hexdigest()
        file.write(digest.encode() + b"\n")
    complete = complete_checkpoints(run)
    for old in complete[:-keep]:
        if keep_every and old.step % keep_every == 0:
            continue
        # unmark first: one that is half deleted must not look complete
        (old.path / COMPLETE).unlink()
        shutil.rmtree(old.path)
    return Checkpoint(final, step)
