"""How often a run was started, and whether it gained anything: a loop without progress ends.

torchrun's `--max-restarts` starts a run again whatever it died of. Each start leaves a line in
`starts.jsonl`; when the last few automatic ones all began at the same checkpoint, another will not
help. SLURM requeues jobs whose nodes failed, which is not the run's fault; how often a job's own
failures are requeued is decided by who requeues them, `launch.attempt`.
"""

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError

STARTS = "starts.jsonl"


class NoRestartHelps(InputError):
    """What no restart mends; whoever started this process should not try again."""


def is_restart() -> bool:
    """Whether torchrun started this process anew by itself."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def note_start(run: Path, step: int, world_size: int, automatic: bool, limit: int) -> None:
    """Writes down a start from `step`; rank 0 only.

    Args:
        run: run directory.
        step: of the checkpoint that it goes on from.
        world_size: ranks.
        automatic: whether a launcher restarted it; a person's start may always try.
        limit: of automatic starts in a row without a step gained; 0 for none.

    Raises:
        NoRestartHelps: there were as many, and none gained a step.
    """
    file = run / STARTS
    starts = read_starts(file)
    fruitless = 0
    for start in reversed(starts):
        if not automatic or not start["automatic"] or start["step"] != step:
            break
        fruitless += 1
    if limit and automatic and fruitless >= limit:
        times = "once" if fruitless == 1 else f"{fruitless} times in a row"
        raise NoRestartHelps(
            f"{run} was restarted {times} from step {step} and ended before the next checkpoint; "
            "that is not tried again. Look at what ended it, mend that (or lower "
            "run.checkpoint_every), and start the same command again"
        )
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "world_size": world_size,
        "automatic": automatic,
    }
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def read_starts(file: Path) -> list[dict[str, Any]]:
    """The rows of `starts.jsonl`; a line that a kill left torn is passed over."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and {"step", "automatic"} <= row.keys():
                rows.append(row)
    return rows


def end_launcher() -> None:
    """Asks torchrun to end instead of starting this again, where it still would."""
    count, most = (
        os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    if count.isdigit() and most.isdigit() and int(count) < int(most):
        with contextlib.suppress(OSError):
            os.kill(os.getppid(), signal.SIGTERM)
