"""One start of a training job under SLURM: what was noted before it, and what follows after it.

The batch script calls `python -m launch.attempt begin` and `… end`. Both write a line into
`slurm/attempts.jsonl` of the run directory. `end` tells the ways apart in which training stops, and
its exit status says what the script does: 0 leaves, 75 requeues, anything else fails with it. A
start without an `end` was killed from outside: its nodes failed, or SLURM had no patience.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launch.slurm_client import own_job, read_restarts

ATTEMPTS = "attempts.jsonl"
FOLDER = "slurm"  # in the run directory
REQUEUE = 75  # EX_TEMPFAIL
BAD_INPUT = 2  # what no restart mends
_STEP = re.compile(r"step-(\d{8,})")
_VARIABLES = ("SLURM_", "CUDA_", "NCCL_", "GLOO_", "OMP_", "TORCH_", "FI_", "UCX_", "DS_")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|KEY|CREDENTIAL|JWT", re.IGNORECASE)
End = Literal["finished", "time limit", "told to end", "crash", "error", "superseded"]


@dataclass(frozen=True)
class Verdict:
    """What an attempt came to.

    Attributes:
        end: in which way.
        status: for the batch script.
        message: the cause, a line for people; empty where all is well.
    """

    end: End
    status: int
    message: str = ""


@dataclass(frozen=True)
class Attempt:
    """What is known when the ranks have ended.

    Attributes:
        status: of srun.
        warned: SLURM sent its signal before the time limit.
        told: SLURM sent SIGTERM: scancel, preemption, scontrol requeue, or the limit itself.
        endings: by node, `Ending` of `launch.ranks`; nodes that left none are missing.
        finished: the run's last step is done.
        gained: steps from the newest checkpoint at its begin to the newest one now.
        fruitless: crashes and time limits in a row before this one that gained none.
        max_crashes: so many in a row that gain nothing are the last.
        log: where the nodes' output is.
    """

    status: int
    warned: bool
    told: bool
    endings: Mapping[str, Mapping[str, Any]]
    finished: bool
    gained: int
    fruitless: int
    max_crashes: int
    log: str


def judge(attempt: Attempt) -> Verdict:
    """What follows: a pure function."""
    errors = [one for one in attempt.endings.values() if one["status"] == BAD_INPUT]
    if attempt.told:
        return Verdict("told to end", 143, "SLURM told the job to end")
    if errors:  # the same on every node as a rule
        causes = sorted({str(one["message"]) for one in errors if one["message"]})
        return Verdict("error", BAD_INPUT, " | ".join(causes) or f"see {attempt.log}")
    if attempt.finished:
        return Verdict("finished", 0)
    if attempt.status == 0 and not attempt.warned:
        return Verdict("finished", 0, "stopped on request, before its last step")
    last = attempt.gained == 0 and attempt.fruitless + 1 >= attempt.max_crashes
    if attempt.warned:
        if not last:
            return Verdict("time limit", REQUEUE, "the time limit is near")
        return Verdict(
            "error",
            1,
            f"{_times(attempt.fruitless + 1)} in a row the job reached its time limit, or died, "
            "without one step gained; raise --time",
        )
    cause = _cause(attempt)
    if not last:
        return Verdict("crash", REQUEUE, cause)
    times = _times(attempt.fruitless + 1)
    return Verdict("error", 1, f"died {times} in a row without one step gained: {cause}")


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _cause(attempt: Attempt) -> str:
    """The message of a node that has one; a rank's own before what follows from it."""
    failed = [(node, one) for node, one in sorted(attempt.endings.items()) if one["status"]]
    told = [str(one["message"]) for _, one in failed if one["message"]]
    if told:
        return told[0]
    where = f" on {failed[0][0]}" if failed else ""
    return f"training ended with status {attempt.status}{where}; see {attempt.log}"


def fruitless_ends(rows: Sequence[Mapping[str, Any]], job: str) -> int:
    """Crashes and time limits of a job in a row, the newest first, that gained no step."""
    count = 0
    for row in reversed(rows):
        if row.get("event") != "end" or row.get("job") != job:
            continue
        if row.get("end") not in ("crash", "time limit") or row.get("gained", 0) > 0:
            break
        count += 1
    return count


def newest_step(run: Path) -> int:
    """Of the newest complete checkpoint, 0 without one."""
    steps = [0]
    with contextlib.suppress(OSError):
        for folder in (run / "checkpoints").iterdir():
            if (match := _STEP.fullmatch(folder.name)) and (folder / "COMPLETE").exists():
                steps.append(int(match.group(1)))
    return max(steps)


def is_finished(run: Path) -> bool:
    """Whether the last row of the metrics is that of the last step: nothing is left to do."""
    last = last_metrics(run)
    return bool(last) and last.get("eta_seconds") == 0 and newest_step(run) >= last["step"]


def last_metrics(run: Path) -> dict[str, Any]:
    """The newest row of training in `metrics.jsonl`, empty before the first."""
    with contextlib.suppress(OSError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 65_536))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "step" in row and "online_seconds" not in row:
                    return row
    return {}


def read_attempts(run: Path) -> list[dict[str, Any]]:
    """All lines; torn ones are passed over."""
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        text = (run / FOLDER / ATTEMPTS).read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def begin(run: Path, options: argparse.Namespace) -> int:
    """Notes the start and its surroundings; status 1 where no further restart is allowed."""
    folder = run / FOLDER / options.attempt
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if restarts > options.max_restarts:
        _say(f"the job was restarted {options.max_restarts} times, the most that it may be; ending")
        return 1
    if restarts:
        _say(f"start {restarts + 1} at step {newest_step(run)}; {_before(run, restarts)}")
    _note(run, "begin", options, step=newest_step(run), nodes=options.nodes)
    environment = {"time": _now(), "restarts": restarts, "job": options.job} | surroundings()
    (folder / "environment.json").write_text(json.dumps(environment, indent=1))
    return 0


def _before(run: Path, restarts: int) -> str:
    """How the start before this one ended."""
    attempt = f"{own_job()}.{restarts - 1}"
    rows = [row for row in read_attempts(run) if row.get("attempt") == attempt]
    end = next((row for row in rows if row.get("event") == "end"), None)
    if end is None:
        return "the one before was killed from outside: nodes failed, or SLURM did not wait"
    return f"the one before: {end.get('end')}, {end.get('message')}"


def surroundings() -> dict[str, Any]:
    """What a later reader needs to know of where this ran; nothing that looks like a secret."""
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and not _SECRET.search(name)
    }
    packages = {one.name: one.version for one in importlib.metadata.distributions()}
    return {
        "host": os.uname().nodename,
        "python": sys.version.split()[0],
        "command": sys.executable,
        "variables": variables,
        "packages": dict(sorted(packages.items())),
    }


def end(run: Path, options: argparse.Namespace) -> int:
    """Decides what follows, notes and says it."""
    if is_superseded(options.attempt, options.job):
        _note(run, "end", options, end="superseded", step=newest_step(run), gained=0, message="")
        _say("SLURM has started this job again elsewhere; this start leaves it alone")
        return 0
    rows, step = read_attempts(run), newest_step(run)
    begun = [row for row in rows if row.get("event") == "begin"]
    before = next((row["step"] for row in reversed(begun) if _is_of(row, options)), step)
    verdict = judge(
        Attempt(
            status=options.status,
            warned=bool(options.warned),
            told=bool(options.told),
            endings=_read_endings(run / FOLDER / options.attempt),
            finished=is_finished(run),
            gained=max(0, step - before),
            fruitless=fruitless_ends(rows, own_job()),
            max_crashes=options.max_crashes,
            log=f"{run}/logs and the lines above",
        )
    )
    _note(run, "end", options, step=step, gained=max(0, step - before), **asdict(verdict))
    if verdict.status == REQUEUE:
        _say(f"{verdict.message}; requeued at step {step}")
    elif verdict.message or verdict.status:
        _say(verdict.message)
    return verdict.status


def is_superseded(attempt: str, job: str) -> bool:
    """Whether SLURM took this job from its nodes and gave it others, while we went on here.

    Args:
        attempt: ours, JOB.RESTARTS.
        job: what `scontrol --oneliner show job` says of it; empty if it says nothing.
    """
    restarts = attempt.partition(".")[2]
    return bool(job) and restarts.isdigit() and read_restarts(job) != int(restarts)


def _read_endings(folder: Path) -> dict[str, dict[str, Any]]:
    endings = {}
    for file in sorted(folder.glob("ended-*.json")):
        with contextlib.suppress(OSError, ValueError):
            row = json.loads(file.read_text())
            if isinstance(row, dict) and isinstance(row.get("status"), int):
                endings[file.stem.removeprefix("ended-")] = {"message": "", **row}
    return endings


def _is_of(row: Mapping[str, Any], options: argparse.Namespace) -> bool:
    return row.get("attempt") == options.attempt and isinstance(row.get("step"), int)


def _note(run: Path, event: str, options: argparse.Namespace, **more: Any) -> None:
    row = {"time": _now(), "event": event, "job": own_job(), "attempt": options.attempt, **more}
    with (run / FOLDER / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _say(message: str) -> None:
    print(f"maskbank: {message}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.attempt", description=__doc__)
    parser.add_argument("event", choices=("begin", "end"))
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--attempt", required=True, metavar="JOB.RESTARTS")
    parser.add_argument("--nodes", default="", help="of this start")
    parser.add_argument("--job", default="", help="what `scontrol --oneliner show job` says")
    parser.add_argument("--max-restarts", type=int, default=1000)
    parser.add_argument("--max-crashes", type=int, default=3)
    parser.add_argument("--status", type=int, default=0, help="of srun")
    parser.add_argument("--warned", type=int, default=0, help="1 after the signal")
    parser.add_argument("--told", type=int, default=0, help="1 after SIGTERM")
    options = parser.parse_args(arguments)
    try:
        return (
            begin(options.run, options) if options.event == "begin" else end(options.run, options)
        )
    except OSError as error:
        _say(f"{options.run}/{FOLDER} cannot be written ({error.strerror}); is the disk full?")
        # after a crash the disk may have room again; before a start nothing is lost
        return 1 if options.event == "begin" else options.status or 1


if __name__ == "__main__":
    sys.exit(main())
