"""Under srun, one a node: torchrun for the ranks of this node, its output kept, its end noted.

    srun … python -m launch.node_agent --run RUN --attempt JOB.RESTARTS TORCHRUN-ARGUMENTS

What the ranks say is appended to `RUN/logs/NODE.log`; how they ended is left in
`RUN/slurm/JOB.RESTARTS/ended-NODE.json` for `launch.attempt`.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.attempt import FOLDER
from launch.ranks import run_ranks


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: that of the rank which failed first."""
    parser = argparse.ArgumentParser(prog="launch.node_agent", description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--attempt", required=True)
    options, torchrun = parser.parse_known_args(arguments)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    redirect_output(options.run / "logs" / f"{node}.log")
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"===== {when} job {options.attempt} on {node}", flush=True)
    ending = run_ranks(torchrun)
    note = options.run / FOLDER / options.attempt / f"ended-{node}.json"
    try:
        part = note.with_suffix(".part")
        part.write_text(json.dumps({"status": ending.status, "message": ending.message}))
        os.replace(part, note)
    except OSError as error:  # the status still reaches srun
        print(f"maskbank: {note} cannot be written ({error.strerror})", file=sys.stderr)
    return ending.status


def redirect_output(log: Path) -> None:
    """Appends stdout and stderr, and those of processes to come, to a file.

    Where that cannot be written they stay where they go now.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        print(f"maskbank: {log} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)


if __name__ == "__main__":
    sys.exit(main())
