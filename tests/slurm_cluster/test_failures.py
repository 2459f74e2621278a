"""What a cluster does to a job: limits, dead nodes, cut cables, requeues and cancellations."""

import random
import time
from pathlib import Path

import pytest

from launch.attempt import read_attempts
from tests.slurm_cluster.cluster import Cluster
from tests.slurm_cluster.runs import (
    assert_same,
    ends,
    hasten,
    last_line,
    reached,
    settings,
    submit_paced,
    train_here,
    train_job,
)
from trainer.checkpoint import complete_checkpoints

pytestmark = pytest.mark.slow


def kill_slurmd(cluster: Cluster, name: str) -> None:
    """Its daemon alone: the job's processes there go on, and nobody can end them."""
    pid = (
        (cluster.folder / f"run/slurmd-{name}.slurm-pid").read_text().strip()
    )  # as the node sees it
    cluster.node("exec", name, "bash", "-c", f"kill -9 {pid}")


def test_time_limit_checkpoint_requeue(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """Of two minutes SLURM's signal leaves 40 to 70 s, and two starts cannot do it."""
    steps = 144
    run, log = tmp_path / "run", tmp_path / "log"
    job = train_job(settings(shards, run, steps), 2, 1, signal_seconds=50)
    number = submit_paced(cluster, job, log, 1.0)
    cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=2")

    def two_gained() -> bool:
        cluster.hurry(number)
        rows = [row for row in read_attempts(run) if row["event"] == "end"]
        return sum(row["end"] == "time limit" and row["gained"] > 0 for row in rows) == 2

    cluster.until(two_gained, "two starts that the limit ended", [number], seconds=400)
    hasten(log)
    cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    assert cluster.wait([number]) == ["COMPLETED"]
    assert cluster.restarts(number) >= 2
    assert set(ends(run)[:-1]) == {"time limit"}
    assert ends(run)[-1] == "finished"
    assert "maskbank: the time limit is near; requeued at step" in log.read_text()
    train_here(settings(shards, tmp_path / "here", steps), ranks=2)
    assert_same(run, tmp_path / "here", steps)


def test_a_time_limit_too_short_for_a_step_ends(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    job = train_job(settings(shards, tmp_path / "run", 8), 1, 1, max_crashes=1)
    number = submit_paced(cluster, job, tmp_path / "log", 100.0)
    cluster.until(lambda: (tmp_path / "run/slurm").exists(), "its record", [number])
    cluster.call("scancel", "--batch", "--signal=USR1", number)  # as SLURM does near the limit
    assert cluster.wait([number]) == ["FAILED"]
    assert "without one step gained; raise --time" in last_line(tmp_path / "log")
    assert ends(tmp_path / "run") == ["error"]


def test_nodes_fail_and_spare_ones_take_over(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    """Power off, cable out, slurmd dead, on three jobs of two nodes each; three nodes are spare."""
    steps = 40
    failures = ("kill", "cut", "slurmd")
    jobs = {}
    for failure in failures:
        job = train_job(settings(shards, tmp_path / failure, steps), 2, 1)
        jobs[failure] = submit_paced(cluster, job, tmp_path / f"{failure}.log", 1.5)
    for failure, number in jobs.items():
        cluster.until(lambda f=failure: reached(tmp_path / f, 8), "step 8", [number])
    struck = {failure: cluster.nodes(number) for failure, number in jobs.items()}
    cluster.node("kill", struck["kill"][1])
    # the batch scripts' own nodes
    cluster.node("cut", struck["cut"][0])
    kill_slurmd(cluster, struck["slurmd"][0])
    try:
        # its processes go on meanwhile, and would be done before SLURM notices
        cluster.until(
            lambda: cluster.restarts(jobs["slurmd"]) == 1, "its requeue", [jobs["slurmd"]]
        )
        for failure in failures:
            hasten(tmp_path / f"{failure}.log")
        assert cluster.wait(list(jobs.values())) == ["COMPLETED"] * 3
        for failure, number in jobs.items():
            assert cluster.restarts(number) == 1, failure
            lost = struck[failure][1 if failure == "kill" else 0]
            assert lost not in cluster.nodes(number)
    finally:
        cluster.node("heal", struck["cut"][0])
        for name in (struck["kill"][1], struck["slurmd"][0]):
            if name == struck["slurmd"][0]:
                cluster.node("kill", name)
            cluster.node("start", name)
    train_here(settings(shards, tmp_path / "here", steps), ranks=2)
    for failure in failures:
        assert_same(tmp_path / failure, tmp_path / "here", steps)
    idle = lambda: cluster.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()  # noqa: E731
    cluster.until(lambda: len(set(idle())) == cluster.num_nodes, "all nodes to be back")
    cluster.until(lambda: not cluster.processes(str(tmp_path)), "what was cut off to end")


def test_requeued_and_cancelled_at_random(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """Twenty times, over four runs: requeued, or cancelled and submitted again."""
    steps, draw = 60, random.Random(0)
    ranks = {"run0": 2, "run1": 2, "run2": 1, "run3": 1}
    left = {"run0": 4, "run1": 4, "run2": 6, "run3": 6}

    def start(name: str) -> str:
        job = train_job(settings(shards, tmp_path / name, steps), 1, ranks[name])
        return submit_paced(cluster, job, tmp_path / f"{name}.log", 2.5)

    jobs = {name: start(name) for name in ranks}
    due = {name: time.monotonic() + draw.uniform(2, 18) for name in ranks}
    while any(left.values()):
        time.sleep(0.2)
        for name, number in jobs.items():
            cluster.hurry(number)
            if not left[name] or time.monotonic() < due[name]:
                continue
            state = cluster.state(number)
            assert state != "COMPLETED", "it is to be struck more often"
            if state != "RUNNING":
                continue
            if draw.random() < 0.6:
                cluster.call("scontrol", "requeue", number)
            else:
                cluster.call("scancel", number)
                cancelled = lambda n=number: cluster.state(n) == "CANCELLED"  # noqa: E731
                cluster.until(cancelled, "the end", [number])
                jobs[name] = start(name)
            left[name] -= 1
            due[name] = time.monotonic() + draw.uniform(2, 18)
    for name in ranks:
        hasten(tmp_path / f"{name}.log")
    assert cluster.wait(list(jobs.values()), seconds=400) == ["COMPLETED"] * 4
    for number in (1, 2):
        train_here(settings(shards, tmp_path / f"here{number}", steps), ranks=number)
    for name, number in ranks.items():
        assert_same(tmp_path / name, tmp_path / f"here{number}", steps)
        assert not list((tmp_path / name / "checkpoints").glob("*.damaged"))
        assert all(not one.problem() for one in complete_checkpoints(tmp_path / name))
    cluster.until(lambda: not cluster.processes(str(tmp_path)), "all processes to end", (), 30)
