"""SLURM's own commands, each with a time limit, and what they say in Python's terms."""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_SECONDS = 30.0  # a controller that is down makes each command wait
_FORMAT = "%i|%T|%r|%N|%M|%j"
# of a job that may still run, however often it has to start
UNFINISHED = frozenset(
    (
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "SIGNALING"),
        *("REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "STAGE_OUT", "RESIZING", "STOPPED"),
        *("PREEMPTED", "NODE_FAIL"),
    )
)


class SlurmError(Exception):
    """A command of SLURM's failed; what it said."""


@dataclass(frozen=True)
class JobState:
    """A job, or a task of an array, as squeue describes it."""

    job: str
    state: str
    reason: str
    nodes: str
    elapsed: str
    name: str


def call(command: Sequence[str], text: str | None = None, seconds: float = _SECONDS) -> str:
    """What a command prints.

    Args:
        command: its words; no shell reads them.
        text: for its standard input.
        seconds: that it has.

    Raises:
        SlurmError: it is not installed, failed, or gave no answer.
    """
    try:
        done = subprocess.run(
            command,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not installed here; submit from a machine of the cluster where it is"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} gave no answer within {seconds:g} s; is SLURM's controller up? "
            "(scontrol ping)"
        ) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise SlurmError(f"{command[0]}: {said}")
    return done.stdout


def sbatch(script: str, options: Sequence[str] = ()) -> str:
    """Submits a script; returns the job's id.

    Raises:
        SlurmError: it was refused; sbatch's reason.
    """
    printed = call(["sbatch", "--parsable", *options], script).strip()
    job = printed.partition(";")[0]  # ID;CLUSTER where there are several
    if not job.isdigit():
        raise SlurmError(f"sbatch printed no job id: {printed!r}")
    return job


def job_states(jobs: Sequence[str]) -> list[JobState]:
    """Of these jobs and all tasks of those that are arrays; jobs that SLURM has forgotten lack.

    Raises:
        SlurmError: squeue failed.
    """
    command = ["squeue", "--noheader", "--states=all", "--array", f"--format={_FORMAT}"]
    try:
        printed = call([*command, f"--jobs={','.join(jobs)}"])
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    rows = [line.split("|", 5) for line in printed.splitlines() if line.count("|") >= 5]
    return [JobState(*row) for row in rows]


def read_restarts(line: str) -> int:
    """How often a job was requeued, from what `scontrol --oneliner show job` prints."""
    found = re.search(r"(?:^|\s)Restarts=(\d+)", line)
    return int(found.group(1)) if found else 0


def own_job() -> str:
    """The id of the job that this process is part of, for SLURM's commands; else empty."""
    return os.environ.get("SLURM_JOB_ID", "")
