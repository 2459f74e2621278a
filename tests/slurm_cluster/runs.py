"""Training runs of the tests: small, exact, and compared bit by bit."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from launch.attempt import read_attempts
from launch.sbatch import Job, Resources, Surroundings, render
from tests.run_state import run_state
from tests.slurm_cluster.cluster import Cluster
from trainer.checkpoint import complete_checkpoints
from trainer.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--recipe", "demo_cpu", "run.log_every=4", "run.checkpoint_every=4", "run.threads=1"),
    *("data.threads=1", "data.loader=torch", "views.image_size=32", "data.batch_size=12"),
    *("bank.capacity=37", "bank.mask_same_image=true", "model.decoder_channels=16"),
    *("model.embedding_dim=8", "model.dropout=0", "run.tensorboard=false"),
    *("run.timeout_seconds=30", "run.start_timeout_seconds=120", "run.precision=float32"),
)


def settings(shards: Path, run: Path, steps: int) -> tuple[str, ...]:
    """Arguments of `maskbank train`."""
    return (*SMALL, f"data.shards={shards}", f"run.directory={run}", f"run.steps={steps}")


def train_job(arguments: tuple[str, ...], nodes: int, ranks: int, **more: object) -> Job:
    """A training job, without the check of the nodes unless that is asked for."""
    job = Job(
        kind="train",
        arguments=arguments,
        resources=Resources(nodes=nodes),
        surroundings=Surroundings(python=(sys.executable,)),
        ranks_per_node=ranks,
        check_seconds=0,
        signal_seconds=10,
    )
    return replace(job, **more)  # type: ignore[arg-type]


def submit_paced(cluster: Cluster, job: Job, log: Path, seconds: float) -> str:
    """Submits a job each step of which takes so much longer, until `hasten(log)`; logs to `log`."""
    paced = f"-m tests.slurm_cluster.paced_train {seconds} {log}.fast"
    script = render(job).replace("-m trainer.train", paced)
    assert paced in script
    return cluster.submit(script, f"--output={log}", f"--chdir={ROOT}")


def hasten(log: Path) -> None:
    """From now on the steps of that job take no longer than they need."""
    log.with_name(f"{log.name}.fast").touch()


def train_here(arguments: tuple[str, ...], ranks: int) -> None:
    """The same run under torchrun on this machine."""
    launcher = ["-m", "launch.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, "-m", "trainer.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def assert_same(run: Path, other: Path, step: int) -> None:
    """Both ended at `step` with the same bits, and logged the same losses on the way."""
    ours, theirs = run_state(run, step), run_state(other, step)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    rows = [read_metrics(one / "metrics.jsonl") for one in (run, other)]
    losses = [[(row["step"], row["loss"], row["bank_fill"]) for row in table] for table in rows]
    assert losses[0] == losses[1]
    assert [step for step, *_ in losses[0]] == list(range(4, step + 1, 4))


def reached(run: Path, step: int) -> bool:
    """Whether there is a complete checkpoint of `step` or a later one."""
    return any(checkpoint.step >= step for checkpoint in complete_checkpoints(run))


def ends(run: Path) -> list[str]:
    """How each start of the job that ended in order did so."""
    return [row["end"] for row in read_attempts(run) if row["event"] == "end"]


def last_line(log: Path) -> str:
    return log.read_text().strip().splitlines()[-1]
