"""`maskbank submit`: what a command line means, and what is said where there is no SLURM."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch.follow import follow, run_line
from launch.sbatch import render
from launch.slurm_client import SlurmError, call, read_restarts
from launch.submit import run_folders
from launch.submit_cli import parse

TRAIN = ("--", "--recipe", "demo_cpu", "data.shards=s", "run.directory=r")


MEASURE = ("evaluate", "--", "kmeans")


def test_options_reach_the_job() -> None:
    (one,) = parse(
        (
            *("train", "--nodes", "3", "--spare-nodes", "1", "--gpus-per-node", "4"),
            *(
                "--partition",
                "gpu",
                "--time",
                "1-00:00:00",
                "--signal",
                "300",
                "--stage",
                "$TMPDIR",
            ),
            *("--sbatch", "mail-type=END", "--sbatch", "exclusive", "--setup", "module load x"),
            *("--container", "a.sif", "--bind", "/data", "--follow", *TRAIN),
        )
    )
    job = one.job
    assert (one.follow, one.dry_run) == (True, False)
    assert job.arguments == TRAIN[1:]
    assert (job.resources.nodes, job.spare_nodes, job.ranks_per_node) == (4, 1, 4)
    assert (job.device, job.signal_seconds, job.stage) == ("cuda", 300, "$TMPDIR")
    assert job.resources.extra == ("mail-type=END", "exclusive")
    assert job.surroundings.python == ("python3",)
    assert "apptainer exec --nv --bind /data a.sif python3" in render(job)
    assert run_folders(job) == [Path("r")]


def test_a_chain_is_parted_by_then() -> None:
    words = ("shards", "--array", "0-3", "--", "scenes", "--output", "s")
    jobs = [
        one.job
        for one in parse(
            (
                *words,
                "--then",
                "train",
                "--seeds",
                "2",
                *TRAIN,
                "--then",
                "evaluate",
                "--",
                "kmeans",
            )
        )
    ]
    assert [job.kind for job in jobs] == ["shards", "train", "evaluate"]
    assert [job.tasks for job in jobs] == ["0-3", "0-1", ""]
    assert jobs[2].arguments == ("kmeans",)
    assert run_folders(jobs[1]) == [Path("r/seed-0"), Path("r/seed-1")]
    assert all(job.surroundings.python == (sys.executable,) for job in jobs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train",), "the arguments of `maskbank train` are missing; give them behind --"),
        (("shards", "--"), "the arguments of `maskbank shards build` are missing"),
        (("dance", "--", "x"), "'dance' is no kind of job"),
        (("evaluate", "--seeds", "2", "--", "x"), "--seeds, --spare-nodes and --stage are for"),
        (("train", "--array", "0-3", *TRAIN), "--array is for shards"),
        (("train", "--time", "soon", *TRAIN), "--time 'soon' is no time"),
        (("train", *TRAIN, "--then", "evaluate"), "job 2 of 2: the arguments of"),
    ],
)
def test_senseless_command_lines_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(words)


def maskbank(*words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path or os.environ["PATH"]},
    )


def test_dry_run_prints_what_sbatch_takes() -> None:
    done = maskbank("submit", "train", "--dry-run", "--nodes", "2", *TRAIN)
    assert done.returncode == 0
    (one,) = parse(("train", "--nodes", "2", *TRAIN))
    assert done.stdout == render(one.job)


def test_unknown_options_come_with_neighbours() -> None:
    done = maskbank("submit", "train", "--nodez", "2", *TRAIN)
    assert done.returncode == 2
    assert "--nodes" in done.stderr


BUILD = ("shards", "--", "folder", "--images", "/i", "--output", "/s")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("train", "--dry-run", "--", "--recipe", "demo_cpu", "data.shard=s"),
            "maskbank: argument 'data.shard=s': there is no setting 'data.shard'; did you mean "
            "data.shards, data.threads, data.loader?\n",
        ),
        (("train", "--", "--recipe", "demo"), "maskbank: there is no recipe 'demo'; the recipes"),
        (("train", *TRAIN, "--config", "/cluster/x.yaml", "run.steps=9d"), "setting run.steps"),
        (("train", "--", "--recipe", "voc_vit_small", "data.shards=s"), "needs model.start"),
        (("train", *TRAIN, "--nproc", "8"), "unrecognized arguments: --nproc"),
        ((*BUILD, "--samples-per-shard", "x"), "Invalid value for '--samples-per-shard'"),
        ((*BUILD, "--then", "train", "--", "run.stepz=1"), "that is job 2 of 2, train; nothing"),
    ],
)
def test_wrong_arguments_are_refused_before_a_job_waits_with_them(
    words: tuple[str, ...], message: str
) -> None:
    done = maskbank("submit", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_arguments_of_evaluations_are_read_by_their_own_command() -> None:
    good = (*BUILD, "--then", "evaluate", "--dry-run", "--", "kmeans", "/r", "--shards", "/v")
    done = maskbank("submit", *good)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 2
    for more, message in (
        (("--shardz", "/v"), "--shards"),
        (("--nproc", "2"), "--nproc 2 is for `maskbank`"),
    ):
        done = maskbank("submit", *good, *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert "maskbank: that is job 2 of 2, evaluate; nothing was submitted\n" in done.stderr


def test_a_configuration_that_only_the_cluster_has_is_not_asked_for() -> None:
    done = maskbank(
        "submit", "train", "--dry-run", *TRAIN, "--config", "/cluster/x.yaml", "run.steps=3"
    )
    assert done.returncode == 0, done.stderr
    assert "/cluster/x.yaml" in done.stdout


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    done = maskbank("submit", "train", *TRAIN, path=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        "maskbank: sbatch is not installed here; submit from a machine of the cluster where it is\n"
    )


def test_commands_have_a_time_limit() -> None:
    with pytest.raises(SlurmError, match=r"sleep gave no answer within 0.1 s"):
        call(["sleep", "10"], seconds=0.1)
    with pytest.raises(SlurmError, match="sh: no such partition"):
        call(["sh", "-c", "echo no such partition >&2; exit 1"])


def test_restarts_are_read() -> None:
    line = "JobId=7 JobName=a b JobState=RUNNING Restarts=3 BatchHost=node2 Comment=x"
    assert read_restarts(line) == 3
    assert read_restarts("") == 0


def test_a_run_is_described_by_its_files(tmp_path: Path) -> None:
    assert run_line(tmp_path) == ""
    row = '{"step": 1200, "loss": 2.5, "images_per_second": 850.4, "eta_seconds": 4980.0}'
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/attempts.jsonl").write_text('{"event": "begin"}\n' * 2)
    assert run_line(tmp_path) == "start 2, step 1,200, loss 2.500, 850 images/s, 1:23:00 left"


def test_follow_gives_up_on_a_controller_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("launch.follow._PAUSE", 0.0)
    assert follow(["7"], [], Console()) == 1
    assert "squeue is not installed here" in capsys.readouterr().out
