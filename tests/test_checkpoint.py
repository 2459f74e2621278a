"""Checkpoints are complete or ignored, and what is kept is what was asked for."""

from pathlib import Path

import pytest
import torch

from data_pipeline.errors import InputError
from tests.untrusted import Malicious
from trainer.checkpoint import (
    COMPLETE,
    complete_checkpoints,
    newest_checkpoint,
    save_checkpoint,
)


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in complete_checkpoints(run)]


def test_the_newest_are_kept_and_load_what_was_saved(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.full((2,), step)}}, keep=2)
    assert steps(tmp_path) == [20, 30]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 30
    assert newest.load("model")["w"].tolist() == [30, 30]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000020",
        "step-00000030",
    ]


def test_what_a_kill_leaves_behind_is_ignored_and_written_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, {"model": {"w": torch.zeros(1)}}, keep=5)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000020").mkdir()  # renamed, not yet marked
    (folder / "step-00000020/model.pt").write_bytes(b"half")
    (folder / ".step-00000020.tmp").mkdir()  # not yet renamed
    assert steps(tmp_path) == [10]
    save_checkpoint(tmp_path, 20, {"model": {"w": torch.ones(1)}}, keep=5)
    assert steps(tmp_path) == [10, 20]
    assert complete_checkpoints(tmp_path)[-1].load("model")["w"].item() == 1


def test_a_write_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, {"model": {"w": torch.zeros(1)}}, keep=1)
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path, 20, {"model": {"w": lambda: 0}}, keep=1)
    assert steps(tmp_path) == [10]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def test_damaged_and_foreign_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_checkpoint(tmp_path, 10, {"model": {"w": torch.zeros(9)}}, keep=1)
    file = checkpoint.path / "model.pt"
    whole = file.read_bytes()
    for damaged in (whole[:-40], b"", b"hello"):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model.pt cannot be read.*step-00000010"):
            checkpoint.load("model")
    torch.save({"w": Malicious()}, file)
    with pytest.raises(InputError, match=r"model.pt cannot be read"):
        checkpoint.load("model")
    assert "unpickled" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"bank.pt cannot be read"):
        checkpoint.load("bank")


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints/step-x").mkdir(parents=True)
    (tmp_path / "checkpoints/step-x" / COMPLETE).touch()
    assert newest_checkpoint(tmp_path) is None
