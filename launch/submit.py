"""Jobs that follow each other, handed to SLURM."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.sbatch import RUN_DIRECTORY, Job, render
from launch.slurm_client import SlurmError, call, sbatch


@dataclass(frozen=True)
class Submitted:
    """A job that SLURM has taken.

    Attributes:
        id: its number.
        job: what it is.
        after: number of the job whose success it waits for, or empty.
    """

    id: str
    job: Job
    after: str = ""


def submit(jobs: Sequence[Job]) -> list[Submitted]:
    """Submits jobs, each of which starts when the one before it is COMPLETED, else never.

    Raises:
        ValueError: a script cannot be written; nothing was submitted.
        SlurmError: one was refused; those before it were withdrawn.
    """
    scripts = [render(job) for job in jobs]
    done: list[Submitted] = []
    for job, script in zip(jobs, scripts, strict=True):
        if job.logs:
            Path(job.logs).mkdir(parents=True, exist_ok=True)
        after = done[-1].id if done else ""
        waiting = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        try:
            done.append(Submitted(sbatch(script, waiting), job, after))
        except SlurmError as error:
            withdrawn = _withdraw(done)
            raise SlurmError(f"{error}{withdrawn}") from None
    return done


def _withdraw(done: Sequence[Submitted]) -> str:
    """Cancels what was submitted before a job that was refused."""
    if not done:
        return ""
    ids = [one.id for one in done]
    try:
        call(["scancel", *ids])
    except SlurmError as error:
        return f"; jobs {', '.join(ids)}, submitted before it, could not be withdrawn ({error})"
    return f"; jobs {', '.join(ids)}, submitted before it, were withdrawn"


def run_folders(job: Job) -> list[Path]:
    """Where a training job's metrics will be, as far as its arguments say it."""
    if job.kind != "train":
        return []
    folders = [
        Path(word.removeprefix(RUN_DIRECTORY))
        for word in job.arguments
        if word.startswith(RUN_DIRECTORY)
    ]
    if job.seeds:
        return [folder / f"seed-{seed}" for folder in folders[-1:] for seed in range(job.seeds)]
    return folders[-1:]
