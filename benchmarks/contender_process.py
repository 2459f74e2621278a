"""A contender as the driver sees it: a process that is asked, and that may fail or hang."""

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.contender import descendants

_END_LIMIT = 60.0  # seconds for a contender to end by itself
_KILL_LIMIT = 10.0  # seconds for the kernel to end what was killed


class ContenderFailed(Exception):
    """A contender ended, or did not answer in time; says why in one line."""


class ContenderProcess:
    """A running contender.

    Args:
        command: that starts it.
        log: file that takes what it and its libraries print.
        limit: seconds until it must be ready.

    Attributes:
        ready: what it said of itself.

    Raises:
        ContenderFailed: it did not become ready.
    """

    def __init__(self, command: Sequence[str], log: Path, limit: float) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as output:
            # a session of its own: Ctrl-C reaches the driver, which ends the contenders in order
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,
            )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.ready = self._answer("ready", limit)
        except BaseException:
            self.kill()
            raise

    def ask(self, limit: float, **request: Any) -> dict[str, Any]:
        """What it answers to a request.

        Raises:
            ContenderFailed: it ended, or did not answer within `limit` seconds.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise ContenderFailed(self._why()) from None
        return self._answer("saved" if "save" in request else "steps", limit)

    def end(self) -> None:
        """Closes its stdin, waits for its end, and ends by force what is left."""
        members = descendants(self._process.pid)
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_LIMIT)
        self._kill(members)

    def kill(self) -> None:
        self._kill(descendants(self._process.pid))

    def _kill(self, members: Sequence[int]) -> None:
        """Kills what is left of `members`, which may have sessions of their own, and waits."""
        for process in filter(_lives, members):
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + _KILL_LIMIT
        while any(map(_lives, members)) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _answer(self, key: str, limit: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise ContenderFailed(f"no answer within {limit:.0f} s") from None
            if answer is None:
                raise ContenderFailed(self._why())
            if "error" in answer:
                raise ContenderFailed(str(answer["error"]))
            if key in answer:
                return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # what a library printed before the contender took the line is passed over
            with suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict):
                    self._answers.put(answer)
        self._answers.put(None)

    def _why(self) -> str:
        """Why it ended: the last that it printed."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        text = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = lines[-1][:300] if lines else "it printed nothing"
        return f"ended with status {self._process.poll()}: {said}"


def _lives(process: int) -> bool:
    """Whether a process is there and more than an entry that nobody has waited for."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"
