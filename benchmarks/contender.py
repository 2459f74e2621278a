"""One side of `benchmarks.side_by_side`: a training loop in a process of its own, steps on demand.

Lines of JSON. After its first steps a contender writes {"ready": true, "name", "settings",
"versions"}; for {"steps": N} it trains N steps and writes {"steps", "images", "seconds",
"cpu_seconds", "peak_rss_mb", "loss"}; for {"save": PATH} it writes its encoder and {"saved": PATH}.
Between two requests it stands still, and when its stdin is closed it ends. Nothing but the standard
library is imported here: peers have environments of their own.
"""

import argparse
import importlib.metadata
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

WARM_UP = 3  # steps before a contender is ready

Step = Callable[[], tuple[int, float | None]]
Save = Callable[[Path], None]

_TICK = os.sysconf("SC_CLK_TCK")
_DISTRIBUTIONS = {  # imported module: distribution
    "torch": "torch",
    "torchvision": "torchvision",
    "lightly": "lightly",
    "webdataset": "webdataset",
    "nvidia.dali": "nvidia-dali-cuda130",
    "PIL": "pillow",
    "numpy": "numpy",
}


class Ended(Exception):
    """The driver has closed stdin: no more steps are wanted."""


class Protocol:
    """The two ends of the line to the driver, out of the way of libraries that print.

    What is printed from here on goes to stderr, and what reads stdin finds it empty: so neither a
    library nor a worker can take or hold the line.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        self._requests: TextIO = os.fdopen(_copy(0), encoding="utf-8")
        self._answers: TextIO = os.fdopen(_copy(1), "w", encoding="utf-8")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)

    def answer(self, **values: Any) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def request(self) -> dict[str, Any]:
        """The next request; waits for it.

        Raises:
            Ended: there will be none.
        """
        line = self._requests.readline()
        if not line:
            raise Ended
        request: dict[str, Any] = json.loads(line)
        return request


_protocol: Protocol | None = None


def claim_protocol() -> Protocol:
    """The line to the driver; the first call, before anything is built, keeps others off it."""
    global _protocol
    if _protocol is None:
        _protocol = Protocol()
    return _protocol


class Paced:
    """For loops that cannot be called step by step: they call `step_done` after each step.

    Args:
        name, settings: told to the driver. `settings["prefetched"]` is the number of batches that
            are made while the contender stands still.
        save: writes the encoder to a path; None where there is none worth it.
        root: process whose descendants are counted with it; this one by default.
    """

    def __init__(
        self, name: str, settings: dict[str, Any], save: Save | None = None, root: int | None = None
    ) -> None:
        self._protocol = claim_protocol()
        self._name, self._settings, self._save = name, settings, save
        self._root = os.getpid() if root is None else root
        self._left, self._steps, self._images = WARM_UP, 0, 0
        self._start, self._cpu_start = 0.0, 0.0

    def step_done(self, images: int, loss: float | None) -> None:
        """Counts a step; at the end of a window waits for the next.

        Args:
            images: that were trained on, over all ranks.
            loss: of the step; None where nothing is trained.

        Raises:
            Ended: no more steps are wanted.
        """
        self._images += images
        self._left -= 1
        if self._left:
            return
        seconds = time.perf_counter() - self._start
        if self._steps:
            self._protocol.answer(
                steps=self._steps,
                images=self._images,
                seconds=seconds,
                cpu_seconds=cpu_seconds(self._root) - self._cpu_start,
                peak_rss_mb=peak_memory_mb(self._root),
                loss=loss if loss is not None and math.isfinite(loss) else None,
            )
        else:
            versions = _versions()
            self._protocol.answer(
                ready=True, name=self._name, settings=self._settings, versions=versions
            )
        self._wait()

    def _wait(self) -> None:
        while True:
            request = self._protocol.request()
            if "save" in request:
                if self._save is None:
                    self._protocol.answer(error=f"{self._name} has no encoder to save")
                    continue
                self._save(Path(request["save"]))
                self._protocol.answer(saved=request["save"])
            elif "steps" in request:
                self._steps = self._left = max(1, int(request["steps"]))
                self._images = 0
                self._cpu_start, self._start = cpu_seconds(self._root), time.perf_counter()
                return


def serve(step: Step, name: str, settings: dict[str, Any], save: Save | None = None) -> None:
    """Trains by `step` as the driver asks, until it asks no more.

    Args:
        step: trains one step; returns its number of images, and its loss (None: nothing trained).
        name, settings, save: see `Paced`.
    """
    paced = Paced(name, settings, save)
    with suppress(Ended):
        while True:
            paced.step_done(*step())


def contender_arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every `compare_*` script understands."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contender", action="store_true", help="speak the protocol; no table")
    parser.add_argument("--root", type=Path, help="data set in the released PASCAL layout")
    parser.add_argument("--shards", type=Path, help="the same data as shards of maskbank")
    parser.add_argument("--size", type=int, default=96, help="side of crops, pixels")
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--workers", type=int, default=2, help="of a peer's DataLoader")
    return parser


def cpu_seconds(root: int) -> float:
    """CPU time of a process and its descendants, also of those that have ended and were waited for.

    Of other processes to the kernel's tick (10 ms), of this one exactly.
    """
    total = 0.0
    for process in descendants(root):
        fields = _stat(process)
        ended = (int(fields[13]) + int(fields[14])) / _TICK if fields else 0.0
        if process == os.getpid():
            own = resource.getrusage(resource.RUSAGE_SELF)
            total += own.ru_utime + own.ru_stime + ended
        elif fields:
            total += (int(fields[11]) + int(fields[12])) / _TICK + ended
    return total


def peak_memory_mb(root: int) -> float:
    """Sum of the processes' peaks, MB; pages that they share count once.

    A process's peak, less what is resident now, plus the share of its own memory that is its own
    (proportional set size, of what no file holds); libraries' pages are counted once, as those of
    the process with the most, whatever other contenders have mapped. Where the kernel does not tell
    shares, shared pages count for each process.
    """
    total, files = 0.0, 0.0
    for process in descendants(root):
        status = _kilobytes(Path(f"/proc/{process}/status"))
        shares = _kilobytes(Path(f"/proc/{process}/smaps_rollup"))
        peak, now = status.get("VmHWM", 0.0), status.get("VmRSS", 0.0)
        of_files = status.get("RssFile", 0.0)
        own = shares.get("Pss_Anon", now - of_files - status.get("RssShmem", 0.0))
        own += shares.get("Pss_Shmem", status.get("RssShmem", 0.0))
        total += peak - now + own
        files = max(files, of_files)
    return (total + files) * 1024 / 1e6


def descendants(root: int) -> list[int]:
    """A process and all below it that live."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [root]
    for process in found:
        found.extend(children.get(process, []))
    return found


def _stat(process: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none of a process that has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _kilobytes(file: Path) -> dict[str, float]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found = (line.split() for line in lines if line.endswith(" kB"))
    return {parts[0].rstrip(":"): float(parts[1]) for parts in found if len(parts) == 3}


def _versions() -> dict[str, str]:
    """Of the packages that matter and have been imported here."""
    found = {"python": sys.version.split()[0]}
    for module, distribution in _DISTRIBUTIONS.items():
        if module in sys.modules:
            with suppress(importlib.metadata.PackageNotFoundError):
                found[distribution] = importlib.metadata.version(distribution)
    return found


def _copy(descriptor: int) -> int:
    """A copy that workers do not inherit."""
    copy = os.dup(descriptor)
    os.set_inheritable(copy, False)
    return copy
