"""Checkpoints that are either complete or ignored, and never unpickle what strangers wrote."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import InputError
from data_pipeline.files import sync_directory

COMPLETE = "COMPLETE"
_FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def load(self, name: str, in_place: bool = False) -> Any:
        """One part, such as `model`, on the CPU; tensors and plain values only.

        Args:
            name: of the part.
            in_place: leave tensors in the file, which then costs memory only where they are read.

        Raises:
            InputError: the file is missing or damaged.
        """
        file = self.path / f"{name}.pt"
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=in_place)
        except Exception as error:  # the safe unpickler raises anything on damaged bytes
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise InputError(
                f"{file} cannot be read ({reason}); delete {self.path} to go on from the one before"
            ) from None


def save_checkpoint(run: Path, step: int, parts: dict[str, Any], keep: int) -> Checkpoint:
    """Writes `parts` aside, syncs, renames and marks complete; then drops all but `keep` newest.

    Raises:
        OSError: as on a full disk; what was there before is untouched.
    """
    folder = run / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, value in parts.items():
            _write(temporary / f"{name}.pt", value)
        sync_directory(temporary)
        if final.exists():  # an earlier one that was never marked complete
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_directory(folder)
        (final / COMPLETE).touch()
        sync_directory(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    complete = complete_checkpoints(run)
    for old in complete[:-keep]:
        # unmark first: one that is half deleted must not look complete
        (old.path / COMPLETE).unlink()
        shutil.rmtree(old.path)
    return complete[-1]


def _write(path: Path, value: Any) -> None:
    try:
        with path.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch hides a full disk behind a RuntimeError
        reason = str(error).splitlines()[0][:200]
        raise OSError(
            f"{path} cannot be written ({reason}); the checkpoint before it stays: free space "
            "(or mend what is wrong there) and start the same command again"
        ) from error


def complete_checkpoints(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run directory, oldest first."""
    found = []
    for marker in (run / _FOLDER).glob(f"step-*/{COMPLETE}"):
        number = marker.parent.name.removeprefix("step-")
        if number.isdigit():
            found.append(Checkpoint(marker.parent, int(number)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run directory."""
    complete = complete_checkpoints(run)
    return complete[-1] if complete else None
