"""Requests to stop: one is remembered, a second one ends processes at once, wherever they are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_run_lock import MAIN
from trainer.preemption import StopRequest

_COMPUTING = """
import hashlib, sys
from pathlib import Path
import torch
from trainer.distributed import start_ranks
from trainer.preemption import StopRequest

with StopRequest(Path(sys.argv[1]), start_ranks("cpu", 60)):
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # a quarter of an hour in one call
"""
_STUBBORN = """
import signal, time
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
print("begun", flush=True)
time.sleep(600)
"""


def test_signals_that_come_together_are_one_request(tmp_path: Path) -> None:
    """A launcher passes on what the terminal or SLURM has sent to its ranks too."""
    with StopRequest(tmp_path, MAIN) as request:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert request.asked()
        assert request.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_request_ends_a_rank_in_the_midst_of_a_long_call(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", _COMPUTING, str(tmp_path)]
    assert _ask_twice(command, number, pause=0.7) == 128 + number


@pytest.mark.slow
def test_a_second_request_ends_ranks_that_do_not_listen() -> None:
    launcher = ["-m", "launch.ranks", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [sys.executable, *launcher, sys.executable, "-c", _STUBBORN]
    assert _ask_twice(command, signal.SIGTERM, pause=1.2, ranks=2) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_the_command_passes_requests_on_and_ends_as_a_shell_says() -> None:
    program = "import time; print('begun', flush=True); time.sleep(600)"
    start = f"from launch.torchrun import run; exit(run([{sys.executable!r}, '-c', {program!r}]))"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):
        process = _start([sys.executable, "-c", start])
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        if number == signal.SIGKILL:  # as the kernel does when memory is short
            (child,) = _children(process.pid)
            os.kill(child, number)
        else:
            process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, output + errors
        assert ("was there too little memory?" in errors) == (number == signal.SIGKILL)


def _ask_twice(
    command: list[str], number: signal.Signals, pause: float, ranks: int = 1
) -> int | None:
    """The exit status of a command that is asked to stop, and asked again a while later."""
    process = _start(command)
    assert process.stdout is not None
    assert process.stderr is not None
    for _ in range(ranks):
        assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    line = process.stderr.readline()
    assert "stopping after this step; once more ends at once" in line, line
    time.sleep(pause)
    assert process.poll() is None
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=25)
    finally:
        process.kill()
    assert f"ended by a second request ({number.name})" in errors
    assert "Traceback" not in errors
    return process.returncode


def _start(command: list[str]) -> subprocess.Popen[str]:
    """In a session of its own, without a terminal that would pass signals on."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
