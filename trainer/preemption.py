"""A request to stop: a signal, or a file in the run directory; acted upon at a step boundary."""

import os
import signal
from pathlib import Path
from types import FrameType

from data_pipeline.files import write_json
from trainer.distributed import Ranks

STOP_FILE = "STOP"
OWNER_FILE = "OWNER"  # who started last; without locks that work between nodes it alone tells
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that this process was asked to stop; never acts in the middle of a step.

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
        self._parent = os.getppid()
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}

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
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self.reason == "SIGINT":
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the checkpoint
        self.reason = name
