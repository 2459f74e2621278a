"""A request to stop: a signal, or a file in the run directory; acted upon at a step boundary.

A second signal ends the process at once, also where its main thread is in a long call of torch: a
thread of its own waits for it.
"""

import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType

from data_pipeline.files import write_json
from trainer.distributed import Ranks
from trainer.watchdog import say

STOP_FILE = "STOP"
OWNER_FILE = "OWNER"  # who started last; without locks that work between nodes it alone tells
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Seconds in which signals are one request: a terminal, a launcher and SLURM may each pass it on.
# The launcher's own is longer, so that what it takes for a second request is one here too.
_ONE_REQUEST = 0.5


class StopRequest:
    """Remembers that this process was asked to stop; only a second signal acts within a step.

    Args:
        run: run directory. A file `STOP` there, whoever made it, stops the run; rank 0 looks, and
            takes it away when it has been obeyed.
        ranks: that have to agree.
    """

    def __init__(self, run: Path, ranks: Ranks) -> None:
        self.reason = ""
        self._file, self._owner_file = run / STOP_FILE, run / OWNER_FILE
        self._owner = (0, 0)
        self._looks = ranks.is_main
        self._alone = ranks.world_size == 1  # of several ranks the launcher speaks
        self._parent = os.getppid()
        self._arrivals, arrival = socket.socketpair()
        arrival.setblocking(False)
        self._arrival = arrival  # Python writes a signal's number here before any of its code runs
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(arrival.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop-requests", daemon=True).start()

    def begin(self) -> None:
        """The run begins: an older file was meant for the run before; rank 0 owns the run now.

        Raises:
            OSError: the run directory cannot be written.
        """
        self.obeyed()
        if self._looks:
            job = os.environ.get("SLURM_JOB_ID", "")
            write_json(
                self._owner_file, {"host": os.uname().nodename, "pid": os.getpid(), "job": job}
            )
            self._owner = self._read_owner()

    def asked(self) -> bool:
        """Whether this rank was asked; the ranks agree on it with `distributed.agree`."""
        if not self.reason and self._looks and self._file.exists():
            self.reason = f"the file {self._file}"
        if not self.reason and self._looks and self._read_owner() != self._owner:
            self.reason = "another start of the same run"
        if not self.reason and os.getppid() != self._parent:
            self.reason = "the launcher's end"  # nobody would start or stop this run any more
        return bool(self.reason)

    def _read_owner(self) -> tuple[int, int]:
        """What tells one writing of the owner's file from another."""
        try:
            status = self._owner_file.stat()
        except OSError:
            return self._owner  # who cannot look has nothing to say
        return status.st_ino, status.st_mtime_ns

    def obeyed(self) -> None:
        """The run stops now."""
        if self._looks:
            self._file.unlink(missing_ok=True)

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._arrival.close()  # ends the thread

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def _watch(self) -> None:
        first = None
        while data := self._arrivals.recv(1):
            number, now = data[0], time.monotonic()
            if number not in _SIGNALS:
                continue
            name = signal.Signals(number).name
            if first is None:
                first, self.reason = now, self.reason or name
                if self._alone:
                    say("stopping after this step; once more ends at once")
            elif now - first > _ONE_REQUEST:
                if self._alone:
                    say(f"ended by a second request ({name}); what was saved stays")
                os._exit(128 + number)
        self._arrivals.close()
