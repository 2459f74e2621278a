"""Command lines of ranks on this machine, and how they end."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from signal import SIGINT, SIGTERM, SIGUSR1
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


def split_nproc(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """How many ranks `--nproc N`, wherever it stands, asks for, and the other arguments.

    What follows `--` is left as it is.

    Raises:
        ValueError: N is not a number of at least 1.
    """
    num_processes, others = 1, list[str]()
    words = iter(arguments)
    for word in words:
        if word == "--":
            others += [word, *words]
        elif word == "--nproc" or word.startswith("--nproc="):
            _, equals, value = word.partition("=")
            value = value if equals else next(words, "")
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"--nproc is {value!r}; it is a number of ranks, from 1 on")
            num_processes = int(value)
        else:
            others.append(word)
    return num_processes, others


def rank_environment(num_processes: int) -> dict[str, str]:
    """The environment for ranks: each gets its share of the cores."""
    share = max(1, len(os.sched_getaffinity(0)) // num_processes)
    return {"OMP_NUM_THREADS": str(share), **os.environ}


def run(command: Sequence[str], num_processes: int = 1) -> int:
    """Runs a command to its end and returns its exit status; requests to stop reach it, not us.

    Where a signal ended it the status is 128 + its number, as a shell has it.
    """
    process = subprocess.Popen(command, env=rank_environment(num_processes))

    def forward(number: int, frame: FrameType | None) -> None:
        if number == SIGINT and _terminal_tells_it():
            return
        with suppress(ProcessLookupError):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (SIGINT, SIGTERM, SIGUSR1)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status >= 0:
        return status
    if (name := signal.Signals(-status).name) not in ("SIGINT", "SIGTERM", "SIGUSR1"):
        hint = "; was there too little memory?" if name == "SIGKILL" else ""
        print(f"maskbank: ended by {name}{hint}", file=sys.stderr, flush=True)
    return 128 - status


def _terminal_tells_it() -> bool:
    """Whether Ctrl-C reaches what we start too: we are what the terminal runs at this moment."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
