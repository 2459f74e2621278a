"""A live view of jobs: state, nodes, and the newest metrics of their runs."""

import contextlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.attempt import last_metrics, read_attempts
from launch.slurm_client import UNFINISHED, JobState, SlurmError, call, job_states

_PAUSE = 2.0  # seconds between two looks; more often is no kindness to a controller
_STATE_STYLES = {"COMPLETED": "green", "RUNNING": "cyan", "PENDING": "yellow"}
_PATIENCE = 10  # looks in a row that may fail


def follow(jobs: Sequence[str], runs: Sequence[Path], console: Console) -> int:
    """Shows jobs until all have ended; 0 if all are COMPLETED. Ctrl-C leaves them running.

    Args:
        jobs: their numbers.
        runs: run directories, for metrics.
        console: a live table on a terminal, elsewhere a line a change.
    """
    states: list[JobState] = []
    try:
        with _view(console) as show:
            failures = 0
            while True:
                try:
                    states, failures = job_states(jobs), 0
                except SlurmError as error:
                    failures += 1
                    if failures == _PATIENCE:
                        console.print(f"maskbank: {error}", markup=False, style="red")
                        return 1
                else:
                    show(states, runs)
                    if all(one.state not in UNFINISHED for one in states):
                        break
                time.sleep(_PAUSE)
    except KeyboardInterrupt:
        console.print(f"the jobs go on; scancel {' '.join(jobs)} ends them")
        return 130
    for one in states:
        if one.state != "COMPLETED" and (line := last_line(one.job)):
            console.print(f"{one.job} {one.name} {one.state}: {line}", markup=False, soft_wrap=True)
    if not states:
        console.print("SLURM does not know these jobs any more; their logs say how they ended")
        return 1
    return int(any(one.state != "COMPLETED" for one in states))


def last_line(job: str) -> str:
    """The last line of a job's log that is not SLURM's: it says why the job failed."""
    with contextlib.suppress(SlurmError, OSError):
        printed = call(["scontrol", "show", "job", job])
        if found := re.search(r"^\s*StdOut=(.*)$", printed, re.MULTILINE):
            lines = Path(found.group(1)).read_text(errors="replace").strip().splitlines()
            own = [line for line in lines if not line.startswith(("srun:", "slurmstepd"))]
            return (own or lines or [""])[-1]
    return ""


@contextlib.contextmanager
def _view(console: Console) -> Any:
    """Yields what shows the states: a table in place on a terminal, else lines that changed."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda states, runs: live.update(_tables(states, runs), refresh=True)
        return
    seen: dict[str, str] = {}

    def changed(states: Sequence[JobState], runs: Sequence[Path]) -> None:
        rows = {one.job: f"{one.name} {one.state} {one.reason} {one.nodes}" for one in states}
        rows |= {str(run): run_line(run) for run in runs}
        for name, row in rows.items():
            if row and seen.get(name) != row:
                seen[name] = row
                console.print(
                    f"{time.strftime('%H:%M:%S')} {name} {row}", markup=False, soft_wrap=True
                )

    yield changed


def _tables(states: Sequence[JobState], runs: Sequence[Path]) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for title in ("job", "name", "state", "time", "nodes, or why it waits"):
        table.add_column(title)
    for one in states:
        state = Text(one.state, style=_STATE_STYLES.get(one.state, "red"))
        where = one.nodes or one.reason
        table.add_row(Text(one.job), Text(one.name), state, Text(one.elapsed), Text(where))
    return Group(table, *(Text(f"{run}: {line}") for run in runs if (line := run_line(run))))


def run_line(run: Path) -> str:
    """Where a run is, and how often it was started."""
    row = last_metrics(run)
    starts = sum(one.get("event") == "begin" for one in read_attempts(run))
    parts = [f"start {starts}"] if starts > 1 else []
    if row:
        parts.append(f"step {row['step']:,}")
        parts += [f"loss {row['loss']:.3f}"] if isinstance(row.get("loss"), float) else []
        parts += [f"{row.get('images_per_second', 0):,.0f} images/s"]
        parts += [f"{_duration(row.get('eta_seconds', 0))} left"]
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60 % 60, int(seconds) // 3600
    return f"{hours}:{minutes:02d}:{int(seconds) % 60:02d}"
