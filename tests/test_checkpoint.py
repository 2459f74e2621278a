"""Checkpoints are complete and whole, or passed over; what is kept is what was asked for."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import InputError
from tests.untrusted import Malicious
from trainer.checkpoint import (
    COMPLETE,
    DESCRIPTION,
    Checkpoint,
    complete_checkpoints,
    newest_checkpoint,
    remove_leftovers,
    set_aside,
    temporary_folder,
)
from trainer.checkpoint_writer import CheckpointWriter
from trainer.distributed import Ranks
from trainer.engine import StateTensor
from trainer.tensor_file import check_file, write_tensors

ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def state(value: float) -> list[StateTensor]:
    return [
        StateTensor(part, "w", torch.full((3, 2), value) + number)
        for number, part in enumerate(("model", "momentum", "optimizer"))
    ]


def bank(value: int) -> dict[str, Tensor]:
    return {"key": torch.full((2, 4), float(value)), "sequence": torch.tensor([value, value + 1])}


def save(run: Path, step: int, keep: int = 2, keep_every: int = 0) -> Checkpoint:
    writer = CheckpointWriter(run, ONE_RANK, keep, keep_every)
    writer.start(step, state(step), bank(step), {"engine": "ddp", "progress": {"step": step}})
    while writer.step is not None:
        writer.wait()
        writer.advance(writer.busy, bool(writer.failure))
    return complete_checkpoints(run)[-1]


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in complete_checkpoints(run)]


def test_the_newest_are_kept_and_load_what_was_saved(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert steps(tmp_path) == [20, 30]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 30
    assert newest.load("model")["w"].tolist() == [[30, 30]] * 3
    assert newest.load("optimizer")["w"].tolist() == [[32, 32]] * 3
    (part,) = newest.bank_parts()
    assert part["sequence"].tolist() == [30, 31]
    assert newest.describe()["progress"] == {"step": 30}
    read = newest.reader("momentum")
    found = read("w")
    assert found is not None
    assert found.tolist() == [[31, 31]] * 3
    assert read("other") is None
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000020", "step-00000030"]
    assert load_file(tmp_path / "export/encoder.safetensors")["w"].tolist() == [[30, 30]] * 3


def test_every_so_many_steps_one_stays(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        save(tmp_path, step, keep=1, keep_every=30)
    assert steps(tmp_path) == [30, 60, 90]


def test_what_a_kill_leaves_behind_is_ignored_and_written_over(tmp_path: Path) -> None:
    save(tmp_path, 10)
    renamed = tmp_path / "checkpoints/step-00000020"  # but not yet marked
    renamed.mkdir()
    (renamed / "model.safetensors").write_bytes(b"half")
    written = temporary_folder(tmp_path, 20)  # not yet renamed
    written.mkdir()
    (written / "old").touch()
    assert steps(tmp_path) == [10]
    remove_leftovers(tmp_path)
    assert not written.exists()
    save(tmp_path, 20)
    assert steps(tmp_path) == [10, 20]
    assert complete_checkpoints(tmp_path)[-1].problem() == ""


def test_a_write_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 10)
    temporary_folder(tmp_path, 20).write_text("in the way")
    writer = CheckpointWriter(tmp_path, ONE_RANK, 1, 0)
    writer.start(20, state(20), bank(20), {"progress": {"step": 20}})
    writer.wait()
    assert "step 20 cannot be written" in writer.failure
    with pytest.raises(OSError, match="the one before it stays: free space"):
        writer.advance(False, True)
    assert writer.step is None
    assert steps(tmp_path) == [10]
    assert newest_checkpoint(tmp_path) is not None


def damage(file: Path, kind: str) -> None:
    data = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
        return
    if kind == "short":
        del data[-1:]
    elif kind == "empty":
        data.clear()
    else:
        data[-3] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["flipped", "short", "empty", "missing"])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.safetensors", "bank-00000.safetensors", DESCRIPTION],
)
def test_every_damage_is_found_and_the_one_before_is_taken(
    tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10)
    damaged = save(tmp_path, 20)
    damage(damaged.path / name, kind)
    assert name in damaged.problem()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 10
    assert "step 20 passed over" in caplog.text
    set_aside(damaged)
    assert steps(tmp_path) == [10]
    assert (tmp_path / "checkpoints/step-00000020.damaged").is_dir()


def test_ranks_share_the_checking(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 10)
    damage(checkpoint.path / "momentum.safetensors", "flipped")
    found = [bool(checkpoint.problem(lambda n, r=rank: n % 3 == r)) for rank in range(3)]
    assert sorted(found) == [False, False, True]


def test_nothing_is_unpickled_and_no_path_leads_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(tmp_path, 10)
    torch.save({"w": Malicious()}, checkpoint.path / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors cannot be read"):
        checkpoint.load("model")
    assert "unpickled" not in capsys.readouterr().out
    file = checkpoint.path / DESCRIPTION
    value = json.loads(file.read_text())
    for name, record in (("../x.safetensors", [1, "a"]), ("x", "y"), ("x", [1])):
        rewrite(file, {**value, "files": {name: record}})
        with pytest.raises(InputError, match=r"checkpoint.json cannot be read"):
            checkpoint.describe()
    for other in ({**value, "version": 99}, [], {"version": 2}):
        rewrite(file, other)
        with pytest.raises(InputError, match=r"checkpoint.json cannot be read"):
            checkpoint.describe()


def rewrite(file: Path, value: object) -> None:
    """As somebody would who can do checksums."""
    file.write_text(json.dumps(value))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (file.parent / COMPLETE).write_text(digest)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints/step-x").mkdir(parents=True)
    (tmp_path / "checkpoints/step-x" / COMPLETE).touch()
    assert newest_checkpoint(tmp_path) is None


def test_files_of_tensors_are_safetensors_with_every_type_and_shape(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(5, 7, generator=draw),
        "transposed": torch.randn(5, 7, generator=draw).T,
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(3, generator=draw).half(),
        "bfloat": torch.randn(3, generator=draw).bfloat16(),
        "wide": torch.randn(3, generator=draw).double(),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 4),
        "small": torch.tensor([1, 2], dtype=torch.int32),
    }
    record = write_tensors(tmp_path / "x.safetensors", tensors)
    assert check_file(tmp_path / "x.safetensors", record) == ""
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name
