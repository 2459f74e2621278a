"""Command lines of ranks on this machine."""

import os
import subprocess
import sys
from collections.abc import Sequence


def module_command(module: str, arguments: Sequence[str]) -> list[str]:
    """One process: `python -m MODULE ARGUMENTS`."""
    return [sys.executable, "-m", module, *arguments]


def torchrun_command(module: str, arguments: Sequence[str], num_processes: int) -> list[str]:
    """`num_processes` ranks on this machine; one needs no torchrun."""
    if num_processes == 1:
        return module_command(module, arguments)
    options = ["--standalone", f"--nproc-per-node={num_processes}", "--no-python"]
    run = [sys.executable, "-m", "torch.distributed.run", *options]
    return [*run, *module_command(module, arguments)]


def rank_environment(num_processes: int) -> dict[str, str]:
    """The environment for ranks: each gets its share of the cores."""
    share = max(1, len(os.sched_getaffinity(0)) // num_processes)
    return {"OMP_NUM_THREADS": str(share), **os.environ}


def run(command: Sequence[str], num_processes: int = 1) -> int:
    """Runs a command to its end and returns its exit status; Ctrl-C reaches it, not us."""
    process = subprocess.Popen(command, env=rank_environment(num_processes))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
