"""Processes that cannot hang us: each has a time limit and dies with the one that started it."""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

_PR_SET_PDEATHSIG = 1  # prctl(2)
_KEPT_BYTES = 100_000  # of what a process says
_SECONDS_TO_DIE = 1.5  # by SIGTERM, and then by SIGKILL
# rules, stack frames of Python and C++, and torchrun's greeting
_CHATTER = r"\s|[-=*]{5}|Traceback|frame #|\S* ?\S+ \d+ torch/distributed/run.py"


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        status: its exit status, negative for a signal, None if it was ended at its time limit.
        output, errors: the ends of what it wrote to stdout and stderr.
        limit: seconds that it had.
    """

    status: int | None
    output: str
    errors: str
    limit: float

    def failure(self) -> str:
        """Why it did not succeed, in one line; empty where it did."""
        if self.status == 0:
            return ""
        said = last_error_line(self.errors)
        if self.status is None:
            return f"no answer within {self.limit:g} s" + (f"; it said: {said}" if said else "")
        if self.status < 0:
            return f"killed by {signal_name(-self.status)}" + (f" after: {said}" if said else "")
        return said or f"ended with status {self.status} and said nothing"


class TimedProcess:
    """A process in a session of its own; leaving the `with` block ends it and what it started.

    Args:
        command: what to run; it reads no input.
        seconds: its time limit, from now on.
        environment: of the process; ours if None.
    """

    def __init__(
        self, command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self._limit, self._end = seconds, time.monotonic() + seconds
        # files, not pipes: nobody blocks on a full or an open one
        self._files = contextlib.ExitStack()
        self._output = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._errors = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # not after it has started: we may be gone by then
        )

    def __enter__(self) -> "TimedProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._files.close()

    def wait(self, ready: Callable[[], bool] = lambda: False) -> Outcome:
        """Waits for its end, for its time limit, or until `ready()`, and ends it then."""
        while self._process.poll() is None and time.monotonic() < self._end and not ready():
            time.sleep(0.02)
        status = self._process.poll()
        if status is None:
            self.kill()
        return Outcome(status, _tail(self._output), _tail(self._errors), self._limit)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """Ends the whole session; one that sleeps in the kernel (a dead network disk) is left."""
        if self._process.poll() is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_SECONDS_TO_DIE)
                return


def start_probe(module: str, arguments: Sequence[str], seconds: float) -> TimedProcess:
    """`python -m MODULE ARGUMENTS SECONDS`, which answers with `run_probe`."""
    return TimedProcess([sys.executable, "-m", module, *arguments, str(seconds)], seconds)


def facts(process: TimedProcess) -> dict[str, Any]:
    """What a probe found; with the key `error` where it broke, died or gave no answer."""
    with process:
        outcome = process.wait()
    if failure := outcome.failure():
        return {"error": failure}
    try:
        found = json.loads(outcome.output)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"error": "the answer cannot be read"}


def run_probe(probe: Callable[[], dict[str, Any]]) -> None:
    """The other end of `facts`: runs `probe` and prints what it returns, or how it broke.

    Whatever a library prints goes to stderr, so that stdout holds the answer alone.
    """
    live_at_most(float(sys.argv[-1]) + 2 * _SECONDS_TO_DIE)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # to tidy up
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        found = probe()
    except Exception as error:
        found = {"error": describe(error)}
    with answer:
        json.dump(found, answer)


def live_at_most(seconds: float, parent: int | None = None) -> None:
    """This process ends after `seconds` in any case, also inside C code.

    Args:
        parent: with which it ends too, where that is not `TimedProcess`, which sees to it itself.
    """
    if parent is not None:
        _die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(max(1, round(seconds)))


_c_library = ctypes.CDLL(None)


def _die_with_parent() -> None:
    with contextlib.suppress(AttributeError):  # Linux has it
        _c_library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def describe(error: BaseException) -> str:
    """An exception in one line, as the user should see it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join([type(error).__name__ + ":", *lines[:1]])
    if "Last error:" in lines[1:-1]:  # nccl's own words, after torch's
        text += ": " + lines[lines.index("Last error:") + 1]
    return _clean(text)


def last_error_line(text: str) -> str:
    """The most useful line of what a process said before it died: its last exception, or line."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    told = named or [line for line in lines if not re.match(_CHATTER, line)]
    return _clean(told[-1]) if told else ""


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def lasting(condition: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    """True once `condition` has been for so long: what it announces may finish in order."""
    since: list[float] = []

    def lasted() -> bool:
        if condition():
            since[:] = since or [time.monotonic()]
        return bool(since) and time.monotonic() - since[0] >= seconds

    return lasted


def waiting(seconds: float, pause: float = 0.05) -> Iterator[float]:
    """The seconds that are left, again and again until none are."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        yield left
        time.sleep(min(pause, left))


def _clean(line: str) -> str:
    """Without the places in C++ and Python sources that libraries put into their messages."""
    line = re.sub(r"\[enforce fail at [^\]]*\]\s*(\S+ [!=<>]+ \S+\.\s+)?", "", line)
    line = re.sub(r"\[[^\]]*\.(cc|cpp|h):\d+\]\s*(\[c10d\]\s*)?", "", line)
    line = re.sub(
        r"^(torch\.\S+\.)?(Runtime|Value|OS|DistBackend|DistNetwork|DistStore)Error: ", "", line
    )
    return line.strip()[:300]


def _tail(file: Any) -> str:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _KEPT_BYTES))
    return str(file.read().decode(errors="replace"))
