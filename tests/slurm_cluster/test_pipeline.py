"""Work handed to a real cluster: chains of jobs, errors, strange names, sick nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sbatch import Job, Resources, Surroundings, render
from tests.run_state import run_state
from tests.slurm_cluster.cluster import Cluster
from tests.slurm_cluster.runs import (
    ROOT,
    SMALL,
    assert_same,
    ends,
    hasten,
    last_line,
    settings,
    submit_paced,
    train_here,
    train_job,
)
from trainer.checkpoint import complete_checkpoints

pytestmark = pytest.mark.slow


def maskbank(cluster: Cluster, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, run in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=folder,
        env={**cluster.environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )


def evaluation(run: Path) -> dict[str, object]:
    found = json.loads((run / "evaluation/kmeans-trained.json").read_text())
    return {name: value for name, value in found.items() if "seconds" not in name}


def test_one_command_builds_trains_and_measures(cluster: Cluster, tmp_path: Path) -> None:
    build = ("scenes", "--count", "24", "--size", "40", "--samples-per-shard", "8")
    train = (*SMALL, "run.steps=16", "data.shards=shards")
    measure = ("--shards", "shards", "--size", "32", "--seeds", "2", "--examples", "0")
    done = maskbank(
        cluster,
        tmp_path,
        *("submit", "shards", "--array", "0-1", "--follow", "--", *build, "--output", "shards"),
        *("--then", "train", "--nodes", "2", "--ranks-per-node", "2", "--time", "10"),
        *("--", *train, "run.directory=run"),
        *("--then", "evaluate", "--nodes", "2", "--", "kmeans", "run", *measure),
    )
    assert done.returncode == 0, done.stdout + done.stderr + cluster.call("squeue", "-t", "all")
    for kind in ("shards", "train", "evaluate"):
        assert f"maskbank-{kind} COMPLETED" in done.stdout
    assert "run step 16" in done.stdout  # what was seen of the metrics
    train_here(
        (
            *SMALL,
            "run.steps=16",
            f"data.shards={tmp_path}/shards",
            f"run.directory={tmp_path}/here",
        ),
        ranks=4,
    )
    here = subprocess.run(
        [sys.executable, "-m", "evaluation.cli", "kmeans", "here", *measure],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert here.returncode == 0, here.stderr
    assert_same(tmp_path / "run", tmp_path / "here", 16)
    assert evaluation(tmp_path / "run") == evaluation(tmp_path / "here")
    for node in ("node1", "node2"):  # what each node said, and what was around it
        assert f" on {node}" in (tmp_path / f"run/logs/{node}.log").read_text()
    (record,) = (path for path in (tmp_path / "run/slurm").iterdir() if path.is_dir())
    kept = json.loads((record / "environment.json").read_text())
    assert kept["packages"]["torch"]
    assert kept["variables"]["SLURM_JOB_NUM_NODES"] == "2"
    assert (record / "script.sbatch").read_text().startswith("#!/bin/bash")


def test_jobs_behind_a_failed_one_do_not_wait_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    done = maskbank(
        cluster,
        tmp_path,
        *("submit", "train", "--follow", "--", "--recipe", "demo_cpu", "--config", "later.yaml"),
        *("--then", "evaluate", "--", "kmeans", "run", "--shards", "shards"),
    )
    assert done.returncode == 1
    assert "maskbank-train FAILED" in done.stdout
    assert "maskbank-evaluate CANCELLED" in done.stdout
    assert "FAILED: maskbank: configuration later.yaml cannot be read" in done.stdout


def test_a_refused_job_withdraws_those_before_it(cluster: Cluster, tmp_path: Path) -> None:
    before = set(cluster.call("squeue", "-h", "-t", "all", "-o", "%i").split())
    done = maskbank(
        cluster,
        tmp_path,
        *("submit", "train", "--sbatch", "begin=now+1hour", "--", "--recipe", "demo_cpu"),
        *("--then", "evaluate", "--partition", "nowhere", "--", "kmeans", "run"),
    )
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert "submitted before it, were withdrawn" in done.stderr
    (job,) = set(cluster.call("squeue", "-h", "-t", "all", "-o", "%i").split()) - before
    assert cluster.state(job) == "CANCELLED"


def test_what_no_restart_mends_fails_with_its_cause(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    """All checkpoints damaged, and a setting that only the ranks can know to be wrong."""
    arguments = settings(shards, tmp_path / "run", 8)
    train_here(arguments, ranks=2)
    damaged = complete_checkpoints(tmp_path / "run")
    for checkpoint in damaged:
        file = checkpoint.path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
    few = (*settings(shards, tmp_path / "few", 8), "data.batch_size=1")
    jobs = [
        cluster.submit(render(train_job(one, 1, 2)), f"--output={tmp_path}/{name}.log")
        for name, one in (("damaged", arguments), ("few", few))
    ]
    assert cluster.wait(jobs) == ["FAILED", "FAILED"]
    assert [cluster.restarts(job) for job in jobs] == [0, 0]
    said = last_line(tmp_path / "damaged.log")
    assert said.startswith("maskbank: ")
    assert f"all {len(damaged)} checkpoints of {tmp_path}/run are damaged" in said
    assert "data.batch_size 1" in last_line(tmp_path / "few.log")
    assert ends(tmp_path / "run") == ends(tmp_path / "few") == ["error"]


def test_a_crash_is_tried_again_but_not_for_ever(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    """A rank that is killed at its second batch after every start."""
    job = train_job(settings(shards, tmp_path / "run", 12), 1, 2, max_crashes=2)
    fault = "-m tests.faulty_train kill 1 2"
    script = render(job).replace("-m trainer.train", fault)
    number = cluster.submit(script, f"--output={tmp_path}/log", f"--chdir={ROOT}")
    assert cluster.wait([number]) == ["FAILED"]
    assert cluster.restarts(number) == 1
    assert ends(tmp_path / "run") == ["crash", "error"]
    said = last_line(tmp_path / "log")
    assert "died 2 times in a row without one step gained" in said
    assert "rank 1" in said


def test_strange_names_reach_the_job_unharmed(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    strange = "a b'c\"d$(touch pwned)`touch pwned`;&\\n#*"
    run, copy = tmp_path / f"run {strange}", tmp_path / f"shards {strange}"
    copy.symlink_to(shards)
    (tmp_path / f"logs {strange}".replace("\\", "")).mkdir()
    job = Job(
        kind="train",
        arguments=settings(copy, run, 4),
        name=f"name {strange}",
        resources=Resources(comment=f"comment {strange} --uid=0"),
        surroundings=Surroundings(python=(sys.executable,)),
        ranks_per_node=1,
        check_seconds=120,
        stage=str(tmp_path / f"stage {strange}"),
        logs=str(tmp_path / f"logs {strange}".replace("\\", "")),
    )
    number = cluster.submit(render(job), f"--chdir={tmp_path}")
    assert cluster.wait([number]) == ["COMPLETED"]
    assert cluster.call("squeue", "-h", "-t", "all", "-j", number, "-o", "%j") == job.name
    assert cluster.call("squeue", "-h", "-t", "all", "-j", number, "-o", "%k") == (
        job.resources.comment
    )
    assert len(run_state(run, 4)) > 10
    (log,) = Path(job.logs).iterdir()
    assert log.name == f"maskbank-train-{number}.log"
    assert not list(tmp_path.rglob("pwned"))
    assert not any((tmp_path / f"stage {strange}").iterdir())  # taken away again


def test_a_sick_node_is_left_out(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """One whose shards are not mounted: with a spare node training goes on, without it says so."""
    arguments = settings(shards, tmp_path / "run", 4)
    sick = "node1"
    cluster.node("exec", sick, "mount", "-t", "tmpfs", "none", str(shards.parent))
    try:
        with_spare = train_job(arguments, 3, 1, spare_nodes=1, check_seconds=120)
        without = train_job(settings(shards, tmp_path / "none", 4), 1, 1, check_seconds=120)
        jobs = [
            cluster.submit(render(job), f"--nodelist={names}", f"--output={tmp_path}/{name}.log")
            for job, names, name in (
                (with_spare, "node[1-3]", "spare"),
                (without, "node1", "none"),
            )
        ]
        assert cluster.wait(jobs) == ["COMPLETED", "FAILED"]
    finally:
        cluster.node("exec", sick, "umount", str(shards.parent))
    logs = [(tmp_path / f"{name}.log").read_text() for name in ("spare", "none")]
    for log in logs:
        assert f"maskbank: node1 is left out: shards: {shards}/manifest.json cannot be read" in log
    assert "training on node2,node3, 1 ranks each" in logs[0]
    assert not (tmp_path / "run/logs/node1.log").exists()
    assert len(run_state(tmp_path / "run", 4)) > 10
    assert "0 of 1 nodes are well, 1 are needed (node1: shards" in last_line(tmp_path / "none.log")


def test_seeds_are_an_array(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """Each task requeues itself alone, also the one whose number is that of the whole array."""
    job = train_job(settings(shards, tmp_path / "runs", 8), 1, 1, seeds=2)
    number = submit_paced(cluster, job, tmp_path / "log", 2.0)
    tasks = [f"{number}_{seed}" for seed in (0, 1)]
    cluster.until(lambda: started(tmp_path), "both", tasks)
    (whole,) = [task for task in tasks if cluster.show(task, "JobId") == number]
    cluster.call("scancel", "--batch", "--signal=USR1", whole)  # as SLURM does near the limit
    cluster.until(lambda: cluster.restarts(whole) == 1, "its requeue", tasks)
    hasten(tmp_path / "log")
    assert cluster.wait(tasks) == ["COMPLETED"] * 2
    assert sorted(cluster.restarts(task) for task in tasks) == [0, 1]
    first, second = (run_state(tmp_path / f"runs/seed-{seed}", 8) for seed in (0, 1))
    name = next(name for name in first if name.startswith("model.") and first[name].dim() == 4)
    assert not first[name].equal(second[name])


def started(folder: Path) -> bool:
    """Whether both trainings of the array have begun."""
    return all((folder / f"runs/seed-{seed}/OWNER").exists() for seed in (0, 1))
