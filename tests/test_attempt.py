"""What a start under SLURM came to, and what follows."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.attempt import (
    REQUEUE,
    Attempt,
    fruitless_ends,
    is_finished,
    is_superseded,
    judge,
    newest_step,
    read_attempts,
    surroundings,
)

PLAIN = Attempt(0, False, False, {}, False, 10, 0, 3, "runs/x/logs")
ENDED = {"status": 0, "message": ""}
FAILED = {"status": 1, "message": "rank 3: no sign of life for 600 s"}
BAD = {"status": 2, "message": "data.shards is not set"}


@pytest.mark.parametrize(
    ("changes", "end", "status", "said"),
    [
        ({"finished": True}, "finished", 0, ""),
        ({}, "finished", 0, "stopped on request"),
        # the signal came while the last checkpoint was being written
        ({"finished": True, "warned": True}, "finished", 0, ""),
        ({"warned": True}, "time limit", REQUEUE, "the time limit is near"),
        # ranks that die of the signal while they start
        ({"warned": True, "status": 138, "gained": 0}, "time limit", REQUEUE, "time limit"),
        (
            {"warned": True, "gained": 0, "fruitless": 2},
            "error",
            1,
            "3 times in a row the job reached its time limit",
        ),
        ({"told": True, "status": 143}, "told to end", 143, "SLURM told"),
        ({"told": True, "status": 2, "endings": {"a": BAD}}, "told to end", 143, "SLURM told"),
        (
            {"status": 143, "endings": {"a": ENDED, "b": BAD}},
            "error",
            2,
            "data.shards is not set",
        ),
        ({"status": 2, "warned": True, "endings": {"b": BAD}}, "error", 2, "data.shards"),
        (
            {"status": 143, "endings": {"a": ENDED | {"status": 1}, "b": FAILED}},
            "crash",
            REQUEUE,
            "rank 3: no sign of life for 600 s",
        ),
        ({"status": 137}, "crash", REQUEUE, "training ended with status 137; see runs/x/logs"),
        ({"status": 1, "gained": 0, "fruitless": 1}, "crash", REQUEUE, "status 1"),
        # a crash that gained a step is no loop, however many there were
        ({"status": 1, "gained": 4, "fruitless": 9}, "crash", REQUEUE, "status 1"),
        (
            {"status": 1, "gained": 0, "fruitless": 2, "endings": {"n": FAILED}},
            "error",
            1,
            "died 3 times in a row without one step gained: rank 3: no sign",
        ),
    ],
)
def test_endings_are_told_apart(
    changes: dict[str, object], end: str, status: int, said: str
) -> None:
    verdict = judge(replace(PLAIN, **changes))  # type: ignore[arg-type]
    assert (verdict.end, verdict.status) == (end, status)
    assert said in verdict.message
    assert bool(said) == bool(verdict.message)


def ended(job: str, end: str, gained: int) -> dict[str, object]:
    return {"event": "end", "job": job, "end": end, "gained": gained}


def test_only_ends_in_vain_and_in_a_row_count() -> None:
    rows = [
        ended("7", "crash", 0),
        ended("7", "time limit", 4),
        ended("7", "crash", 0),
        {"event": "begin", "job": "7"},  # killed by a node's failure: nobody's fault
        ended("6", "crash", 0),
        ended("7", "time limit", 0),
    ]
    assert fruitless_ends(rows, "7") == 2
    assert fruitless_ends(rows[:2], "7") == 0
    assert fruitless_ends([*rows, ended("7", "told to end", 0)], "7") == 0


def make_run(run: Path, step: int, eta: float, complete: bool = True) -> None:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    if complete:
        (folder / "COMPLETE").touch()
    row = {"step": step, "eta_seconds": eta, "loss": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + '\n{"torn')


@pytest.mark.parametrize(
    ("eta", "complete", "finished"), [(0.0, True, True), (3.5, True, False), (0.0, False, False)]
)
def test_finished_means_the_last_step_is_saved(
    tmp_path: Path, eta: float, complete: bool, finished: bool
) -> None:
    make_run(tmp_path, 12, eta, complete)
    assert is_finished(tmp_path) == finished
    assert newest_step(tmp_path) == (12 if complete else 0)


def test_an_empty_run_is_not_finished(tmp_path: Path) -> None:
    assert not is_finished(tmp_path)
    assert newest_step(tmp_path) == 0
    assert read_attempts(tmp_path) == []


def test_a_job_that_went_on_elsewhere_is_left_alone() -> None:
    line = "JobId=7 JobName=x Restarts=2 BatchHost=node3 JobState=RUNNING"
    assert is_superseded("7.1", line)
    assert not is_superseded("7.2", line)
    assert not is_superseded("7.1", "")  # SLURM does not answer


def attempt(run: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.attempt", words[0], str(run), *words[1:]],
        env={**os.environ, "SLURM_JOB_ID": "7", **environment},
        capture_output=True,
        text=True,
    )


def test_begin_and_end_as_the_script_calls_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = "JobId=7 Restarts=0"
    begun = attempt(run, "begin", "--attempt", "7.0", "--nodes", "node[1-2]", "--job", job)
    assert begun.returncode == 0, begun.stderr
    make_run(run, 8, 99.0)
    (run / "slurm/7.0/ended-node2.json").write_text(json.dumps(FAILED))
    (run / "slurm/7.0/ended-node1.json").write_text("{")
    done = attempt(run, "end", "--attempt", "7.0", "--status", "1", "--job", job)
    assert done.returncode == REQUEUE
    assert done.stdout == "maskbank: rank 3: no sign of life for 600 s; requeued at step 8\n"
    first, second = read_attempts(run)
    assert (first["event"], first["step"], first["nodes"]) == ("begin", 0, "node[1-2]")
    assert (second["end"], second["gained"], second["step"]) == ("crash", 8, 8)
    kept = json.loads((run / "slurm/7.0/environment.json").read_text())
    assert kept["job"] == job
    assert kept["variables"]["SLURM_JOB_ID"] == "7"
    elsewhere = attempt(run, "end", "--attempt", "7.0", "--job", "JobId=7 Restarts=1")
    assert elsewhere.returncode == 0
    assert "SLURM has started this job again elsewhere" in elsewhere.stdout


def test_a_start_says_how_the_one_before_ended(tmp_path: Path) -> None:
    attempt(tmp_path, "begin", "--attempt", "7.0")
    make_run(tmp_path, 8, 99.0)
    attempt(tmp_path, "end", "--attempt", "7.0", "--warned", "1", "--status", "0")
    second = attempt(tmp_path, "begin", "--attempt", "7.1", SLURM_RESTART_COUNT="1")
    assert second.stdout == (
        "maskbank: start 2 at step 8; the one before: time limit, the time limit is near\n"
    )
    third = attempt(tmp_path, "begin", "--attempt", "7.2", SLURM_RESTART_COUNT="2")
    assert "the one before was killed from outside" in third.stdout


def test_the_number_of_restarts_is_bounded(tmp_path: Path) -> None:
    words = ("begin", "--attempt", "7.4", "--max-restarts", "3")
    assert attempt(tmp_path, *words, SLURM_RESTART_COUNT="3").returncode == 0
    last = attempt(tmp_path, *words, SLURM_RESTART_COUNT="4")
    assert last.returncode == 1
    assert "restarted 3 times, the most that it may be" in last.stdout


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "slurm").write_text("a file where a folder should be")
    done = attempt(tmp_path, "begin", "--attempt", "7.0")
    assert done.returncode == 1
    assert f"{tmp_path}/slurm cannot be written" in done.stdout


def test_secrets_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "x")
    monkeypatch.setenv("SLURM_JWT", "secret")
    monkeypatch.setenv("NCCL_API_KEY", "secret")
    monkeypatch.setenv("MY_PASSWORD", "secret")
    kept = surroundings()["variables"]
    assert kept["SLURM_JOB_NAME"] == "x"
    assert "secret" not in kept.values()
