"""torchrun with manners: `python -m launch.ranks TORCHRUN-ARGUMENTS`.

A request to stop (Ctrl-C, SIGTERM, SIGUSR1) reaches the ranks as SIGUSR1, and they are left to
finish their step and checkpoint; torchrun itself would kill them after 30 seconds. The second
request ends them at once. When a rank fails, its own line says why, without a traceback through the
launcher.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ONE_REQUEST = 1.0  # seconds in which signals are one request: a group of processes gets several
_SECONDS_TO_END = 3.0


@dataclass(frozen=True)
class Ending:
    """How the ranks of this node ended.

    Attributes:
        status: for our own exit: that of the rank that failed first, 1 if a signal ended it.
        message: what that rank left as its cause; empty if nothing.
    """

    status: int
    message: str = ""


def run_ranks(arguments: list[str]) -> Ending:
    """Runs torchrun to its end. What went wrong has then been said, by the rank itself or here."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # ranks have said it themselves
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if any(word.startswith("--nnodes") and ":" in word for word in arguments):
        # torch 2.14 does not tell a node that comes later where the store is, if it is shared
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    requests = _Requests()
    for number in _REQUESTS:
        signal.signal(number, requests.receive)
    try:
        # torchrun's own folder for error files would stay in /tmp after every run
        with tempfile.TemporaryDirectory(
            prefix="maskbank-ranks-", ignore_cleanup_errors=True
        ) as logs:
            torchrun([f"--log-dir={logs}", "--signals-to-handle=SIGHUP,SIGQUIT", *arguments])
    except RendezvousError as error:
        message = (
            f"the nodes have lost each other ({error}); the node that all meet at "
            "(--rdzv-endpoint) must stay until the end"
        )
        _say(message)
        return Ending(1, message)
    except SignalException as error:
        return _ended_by(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if requests.newest and abs(failure.exitcode) % 128 in _REQUESTS:
            return _ended_by(requests.newest)  # before ranks could stop by themselves, or at once
        if failure.exitcode >= 0:  # it has said why
            left = (
                failure.message
            )  # {"message": …} from the rank's error file, else torch's own text
            cause = str(left.get("message", "")) if isinstance(left, dict) else ""
            return Ending(failure.exitcode or 1, cause)
        name = signal.Signals(-failure.exitcode).name
        hint = "; was there too little memory?" if name == "SIGKILL" else ""
        message = f"rank {rank} was ended by {name}{hint}"
        _say(message)
        return Ending(1, message)
    return Ending(0)


def main(arguments: list[str] | None = None) -> int:
    """Runs torchrun; its exit status is that of the rank that failed first."""
    return run_ranks(arguments or sys.argv[1:]).status


def _ended_by(request: signal.Signals) -> Ending:
    return Ending(128 + request, f"ended on request ({request.name})")


def _say(message: str) -> None:
    erase = "\r\x1b[2K" if sys.stderr.isatty() else ""  # a rank's bar, which it will draw again
    print(f"{erase}maskbank: {message}", file=sys.stderr, flush=True)


class _Requests:
    """The first one is passed on to the ranks; the second ends them.

    Attributes:
        newest: of the requests that counted.
    """

    def __init__(self) -> None:
        self.newest: signal.Signals | None = None
        self._first, self._ending = 0.0, False

    def receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._first:
            self._first, self.newest = now, signal.Signals(number)
            if number != signal.SIGINT or not sys.stdin.isatty():  # a terminal tells the ranks too
                _signal_children(signal.SIGUSR1)
            _say("stopping after this step; once more ends at once")
        elif not self._ending and now - self._first > _ONE_REQUEST:
            self._ending, self.newest = True, signal.Signals(number)
            self._end(self.newest)

    def _end(self, number: signal.Signals) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        _say(f"ended by a second request ({number.name}); what was saved stays")
        # torchrun gives its ranks 30 seconds after SIGTERM
        killer = threading.Timer(_SECONDS_TO_END, _signal_children, [signal.SIGKILL])
        killer.daemon = True
        killer.start()
        raise SignalException("ended by request", sigval=number)


def _signal_children(number: signal.Signals) -> None:
    for child in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


def _children() -> list[int]:
    file = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


if __name__ == "__main__":
    sys.exit(main())
