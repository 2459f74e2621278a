"""Faults of one rank: all end in bounded time, the message names it, the next start heals it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.build_config import BuildConfig
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from tests.test_train import ENVIRONMENT, assert_same_run, children, finish, finish_in_full, start
from tests.test_train import command as plain_command
from trainer.checkpoint import complete_checkpoints, newest_checkpoint
from trainer.metrics import read_metrics

pytestmark = pytest.mark.slow
TIMEOUT = 6.0  # run.timeout_seconds
FAST = (f"run.timeout_seconds={TIMEOUT}", "run.start_timeout_seconds=60")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shards"
    build_shards(list_scenes(20, 0, 40), root, BuildConfig(7, "ids"))
    return root


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish_in_full(command(shards, run, 2))
    return run


def command(shards: Path, run: Path, ranks: int, *settings: str) -> list[str]:
    """As `maskbank train` starts it."""
    plain = plain_command(shards, run, ranks, *FAST, *settings)
    return [word.replace("torch.distributed.run", "launch.ranks") for word in plain]


def faulty(arguments: list[str], fault: str, rank: int, number: int) -> list[str]:
    where = arguments.index("trainer.train")
    program = ["tests.faulty_train", fault, str(rank), str(number)]
    return [*arguments[:where], *program, *arguments[where + 1 :]]


def start_in_full(arguments: list[str]) -> "subprocess.Popen[str]":
    """From the start of Python on, nothing forked."""
    return subprocess.Popen(
        arguments,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_to_end(arguments: list[str]) -> tuple[int, str]:
    process = start(arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode is not None
    return process.returncode, output


@pytest.mark.parametrize(
    ("fault", "rank", "message"),
    [
        ("raise", 1, r"maskbank: rank 1: shard-000003.tar cannot be read (Input/output error)"),
        ("stop", 1, "maskbank: rank 1: no sign of life for 6 s"),
        ("stop", 0, "maskbank: rank 0: no sign of life for 6 s"),
        (
            "hang",
            1,
            "maskbank: rank 1: nothing has moved for 6 s: rank 1 has been waiting for",
        ),
        ("kill", 1, "maskbank: rank 1: its process has ended without a word, in step 7"),
        ("kill", 0, "maskbank: rank 0: its process has ended without a word, in step 7"),
    ],
)
def test_a_fault_of_one_rank_ends_all_and_the_next_start_heals_it(
    shards: Path, undisturbed: Path, tmp_path: Path, fault: str, rank: int, message: str
) -> None:
    run = tmp_path / "run"
    arguments = command(shards, run, 2)
    status, output = run_to_end(faulty(arguments, fault, rank, 7))
    assert status in (1, 2), output
    assert output.count(message) == 1, output
    assert "Traceback" not in output, output
    if fault in ("stop", "hang"):
        witness = run / f"hangs/step-00000006/rank-0000{1 - rank}.txt"
        assert "computing in step 7" in witness.read_text()
        assert "contrast_views" in witness.read_text() or "choose_pixels" in witness.read_text()
        collectives = json.loads(witness.with_name(f"collectives-0000{1 - rank}.json").read_text())
        assert collectives["entries"][-1]["profiling_name"].startswith("gloo:")
    if rank == 1:  # what the next start finds does not depend on who failed
        finish(arguments)
        assert_same_run(run, undisturbed)


@pytest.mark.parametrize("fault", ["nan", "nan-keys"])
def test_a_nan_on_one_rank_costs_one_step_and_leaves_no_trace(
    shards: Path, tmp_path: Path, fault: str
) -> None:
    run = tmp_path / "run"
    arguments = command(shards, run, 2, "run.log_every=1")
    status, output = run_to_end(faulty(arguments, fault, 1, 7))
    assert status == 0, output
    # a key that is no number is a negative of all ranks' pixels, so that all losses are none
    assert f"step 7 skipped: the loss of rank {1 if fault == 'nan' else 0} is not finite" in output
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0] * 6 + [1] * 18
    assert rows[6]["loss"] == 0
    end = newest_checkpoint(run)
    assert end is not None
    assert end.describe()["progress"]["skipped"] == 1
    for part in ("model", "momentum", "optimizer"):
        assert all(value.isfinite().all() for value in end.load(part).values())
    assert all(part["key"].isfinite().all() for part in end.bank_parts())


def test_too_many_of_them_in_a_row_end_the_run(shards: Path, tmp_path: Path) -> None:
    arguments = command(shards, tmp_path / "run", 2, "run.max_skipped=3")
    status, output = run_to_end(faulty(arguments, "nan*2", 1, 5))
    assert status == 0, output
    status, output = run_to_end(
        faulty(command(shards, tmp_path / "more", 2, "run.max_skipped=3"), "nan*9", 1, 5)
    )
    assert status == 1
    assert "maskbank: rank 1: the loss is not finite, for 3 steps in a row" in output
    found = newest_checkpoint(tmp_path / "more")
    assert found is not None
    assert found.step == 4


def test_one_rank_alone_notices_too_that_it_hangs(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = command(shards, run, 1)
    where = arguments.index("-m")
    status, output = run_to_end(
        [*arguments[:where], "-m", *faulty(arguments[where + 1 :], "hang", 0, 3)]
    )
    assert status == 1
    assert "rank 0: nothing has moved for 6 s: rank 0 has been waiting for data" in output
    assert "tests/faulty_train.py" in (run / "hangs/step-00000002/rank-00000.txt").read_text()


def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = command(shards, run, 2)
    status, output = run_to_end(faulty(arguments, "kill", 1, 11))
    assert status == 1
    newest = complete_checkpoints(run)[-1]
    assert newest.step == 8
    file = newest.path / "momentum.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    output = finish(arguments)
    assert "checkpoint of step 8 is damaged" in output
    assert "momentum.safetensors has another checksum than when written" in output
    assert "going on from the one before, of step 4" in output
    assert (run / "checkpoints/step-00000008.damaged").is_dir()
    assert_same_run(run, undisturbed)


def test_a_second_run_in_the_same_directory_is_refused(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(command(shards, run, 2, "run.steps=4000"))
    try:
        while not complete_checkpoints(run):
            time.sleep(0.05)
        status, output = run_to_end(command(shards, run, 1, "run.steps=4000"))
        assert status == 2
        assert f"another process is training in {run} at this moment" in output
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == 0


def test_ranks_whose_launcher_is_gone_stop_by_themselves(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = start(command(shards, run, 2, "run.steps=4000"))
    while not complete_checkpoints(run):
        time.sleep(0.05)
    ranks = children(launcher.pid)
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "file"])
def test_the_command_saves_and_ends_well_when_asked(shards: Path, tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    arguments = plain_command(shards, run, 1, *FAST, "run.steps=4000")
    arguments = arguments[arguments.index("--recipe") :]
    words = [sys.executable, "-m", "launch.cli", "train", "--nproc", "2", *arguments]
    process = start_in_full(words) if how == "SIGINT" else start(words)
    while not complete_checkpoints(run):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    if how == "file":
        (run / "STOP").touch()
    elif how == "SIGINT":  # a terminal sends it to all
        group = [process.pid, *children(process.pid)]
        for pid in [*group, *children(group[1])]:
            os.kill(pid, signal.SIGINT)
    else:
        process.send_signal(signal.Signals[how])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Traceback" not in output, output
    newest = newest_checkpoint(run)
    assert newest is not None
    assert 4 <= newest.step < 4000
    assert not (run / "STOP").exists()


def test_torchruns_restarts_go_on_and_end_when_they_gain_nothing(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = command(shards, run, 2)
    where = arguments.index("launch.ranks") + 1
    restarting = [*arguments[:where], "--max-restarts=9", *arguments[where:]]
    status, output = run_to_end(faulty(restarting, "kill", 1, 7))
    assert status == 0, output  # each start comes six steps further
    assert_same_run(run, undisturbed)

    run = tmp_path / "in-vain"
    arguments = command(shards, run, 2, "run.max_fruitless_restarts=1", "run.steps=4")
    restarting = [*arguments[:where], "--max-restarts=9", *arguments[where:]]
    status, output = run_to_end(faulty(restarting, "kill", 1, 3))
    assert status != 0
    assert "was restarted once from step 0 and ended before the next checkpoint" in output
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["automatic"] for start in starts] == [False, True]
    finish(arguments)  # a person may always try
