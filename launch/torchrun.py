"""Command lines of ranks on this machine."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from signal import SIGTERM, SIGUSR1
from types import FrameType


def module_command(module: str, arguments: Sequence[str]) -> list[str]:
    """One process: `python -m MODULE ARGUMENTS`."""
    return [sys.executable, "-m", module, *arguments]


def torchrun_command(module: str, arguments: Sequence[str], num_processes: int) -> list[str]:
    """`num_processes` ranks on this machine; one needs no torchrun."""
    if num_processes == 1:
        return module_command(module, arguments)
    options = ["--standalone", f"--nproc-per-node={num_processes}", "--no-python"]
    return [*module_command("launch.ranks", options), *module_command(module, arguments)]


def rank_environment(num_processes: int) -> dict[str, str]:
    """The environment for ranks: each gets its share of the cores."""
    share = max(1, len(os.sched_getaffinity(0)) // num_processes)
    return {"OMP_NUM_THREADS": str(share), **os.environ}


def run(command: Sequence[str], num_processes: int = 1) -> int:
    """Runs a command to its end and returns its exit status; requests to stop reach it, not us."""
    process = subprocess.Popen(command, env=rank_environment(num_processes))

    def forward(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (SIGTERM, SIGUSR1)}
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal has sent it to the command too
                continue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
