"""What a command and all processes that it starts hold, seen from outside through /proc."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MARK = "MASKBANK_WATCHED"
_SHARED = "/dev/shm/"
_SECONDS_TO_LEAVE = 10.0  # that processes have after the command has ended
_MIB = ((1, "under 1 MiB"), (16, "1 to 16 MiB"), (64, "16 to 64 MiB"), (1 << 40, "above 64 MiB"))


@dataclass(frozen=True)
class Held:
    """By one process at one moment.

    Attributes:
        resident: MB in memory, shared pages counted whole.
        proportional: MB, of shared pages this process's part.
        anonymous: MB that no file backs: heap, stacks, buffers.
        descriptors: how many of each kind; files by name, digits as N.
        threads: how many of each name.
        segments: names of shared memory, mapped or open.
    """

    resident: float
    proportional: float
    anonymous: float
    descriptors: Counter[str]
    threads: Counter[str]
    segments: frozenset[str]

    def plus(self, other: "Held") -> "Held":
        return Held(
            self.resident + other.resident,
            self.proportional + other.proportional,
            self.anonymous + other.anonymous,
            self.descriptors + other.descriptors,
            self.threads + other.threads,
            self.segments | other.segments,
        )


@dataclass(frozen=True)
class Sample:
    """All processes at one moment: seconds since the start, and steps that the run had logged."""

    seconds: float
    step: int
    processes: int
    held: dict[str, Held]


@dataclass
class Left:
    """What was still there after the end, or came to be and should not have.

    Attributes:
        processes: command lines.
        segments: of shared memory, that the processes had held.
        in_run: sockets, pipes, and temporary files in the run directory.
        temporary: entries of the processes' folder for temporary files.
        strangers: segments that came meanwhile, that no process holds, and that were not seen
            in these processes' hands: another program's, or ours for less than an interval.
    """

    processes: list[str] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)
    in_run: list[str] = field(default_factory=list)
    temporary: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.processes or self.segments or self.in_run or self.temporary)


@dataclass
class Watched:
    """A command that has ended.

    Attributes:
        status: its exit status.
        samples: in the order of time.
        mappings: MB in memory by kind of mapping, by (step asked for, role).
        left: behind.
    """

    status: int
    samples: list[Sample]
    mappings: dict[tuple[int, str], Counter[str]]
    left: Left


def watch(
    command: Sequence[str],
    run: Path,
    temporary: Path,
    role: Callable[[int], str],
    interval: float = 0.5,
    map_at: Sequence[int] = (),
    caches: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    log: Path | None = None,
) -> Watched:
    """Runs a command to its end, and ends what it leaves behind.

    Args:
        command: that logs `step` in rows of `metrics.jsonl` in its run directory.
        run: run directory.
        temporary: an empty folder for the temporary files of all processes.
        role: what a process is called; those with one name are added up.
        interval: seconds between samples; there is one at each new row, too.
        map_at: steps at which the mappings are looked at one by one.
        caches: how names of temporary files begin that are to stay.
        environment: of the command; this process's without.
        log: where its output goes; nowhere without.
    """
    family = Family(uuid.uuid4().hex)
    before = set(os.listdir(_SHARED)) if Path(_SHARED).is_dir() else set()
    whole = {**(environment or os.environ), "TMPDIR": str(temporary), _MARK: family.mark}
    samples: list[Sample] = []
    mappings: dict[tuple[int, str], Counter[str]] = {}
    seen: set[str] = set()
    waiting = sorted(map_at)
    steps, start = _Steps(run / "metrics.jsonl"), time.monotonic()
    with open(log or os.devnull, "ab") as output:
        process = subprocess.Popen(command, env=whole, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                sample = _take(family, role, time.monotonic() - start, steps.last())
                samples.append(sample)
                for held in sample.held.values():
                    seen |= held.segments
                while waiting and sample.step >= waiting[0]:
                    step = waiting.pop(0)
                    for pid in family.processes():
                        mappings.setdefault((step, role(pid)), Counter()).update(_mappings(pid))
                _pause(process, interval, steps, sample.step)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            left = _left_behind(family, before, seen, run, temporary)
            left.temporary = [name for name in left.temporary if not name.startswith(tuple(caches))]
    return Watched(process.returncode, samples, mappings, left)


class Family:
    """All processes with a mark in their environment, whoever their parents are by now."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._known: dict[tuple[int, str], bool] = {}  # by process and time of its start

    def processes(self) -> list[int]:
        """Those that run; zombies have ended."""
        found = []
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            fields = _read(f"/proc/{name}/stat").rpartition(")")[2].split()
            if len(fields) < 20 or fields[0] in "ZX":
                continue
            key = int(name), fields[19]
            if key not in self._known:
                words = _read(f"/proc/{name}/environ").split("\0")
                self._known[key] = f"{_MARK}={self.mark}" in words
            if self._known[key]:
                found.append(int(name))
        return found


def look_at(pid: int) -> Held | None:
    """What a process holds; None if it has ended meanwhile."""
    rollup = _read(f"/proc/{pid}/smaps_rollup")
    sizes = {line.partition(":")[0]: line.split()[1] for line in rollup.splitlines()[1:]}
    if "Rss" not in sizes:
        return None
    descriptors: Counter[str] = Counter()
    segments = set()
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{number}")
                descriptors[_kind(target)] += 1
                segments.add(_segment(target))
    for line in _read(f"/proc/{pid}/maps").splitlines():
        segments.add(_segment(line))
    segments.discard("")
    threads: Counter[str] = Counter()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            threads[_read(f"/proc/{pid}/task/{thread}/comm").strip()] += 1
    megabytes = (int(sizes[name]) * 1024 / 1e6 for name in ("Rss", "Pss", "Anonymous"))
    return Held(*megabytes, descriptors, threads, frozenset(segments))


def command_line(pid: int) -> list[str]:
    return _read(f"/proc/{pid}/cmdline").split("\0")[:-1]


def variable(pid: int, name: str) -> str:
    """Of a process's environment at its start; '' if it has none of that name."""
    words = _read(f"/proc/{pid}/environ").split("\0")
    return next((w.partition("=")[2] for w in words if w.startswith(f"{name}=")), "")


def _take(family: Family, role: Callable[[int], str], seconds: float, step: int) -> Sample:
    held: dict[str, Held] = {}
    processes = family.processes()
    for pid in processes:
        name, found = role(pid), look_at(pid)
        if found is not None:
            held[name] = held[name].plus(found) if name in held else found
    return Sample(seconds, step, len(processes), held)


def _pause(process: subprocess.Popen[Any], interval: float, steps: "_Steps", step: int) -> None:
    """Until the interval is over, a row was logged, or the command has ended."""
    deadline = time.monotonic() + interval
    while time.monotonic() < deadline and process.poll() is None and steps.last() == step:
        time.sleep(min(0.05, interval))


class _Steps:
    """The step of the newest row of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._last = path, 0, 0

    def last(self) -> int:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._place)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._place += len(whole + newline)
            for line in whole.splitlines():
                self._last = max(self._last, int(json.loads(line)["step"]))
        return self._last


def _mappings(pid: int) -> Counter[str]:
    """MB in memory by kind of mapping: a file's name, the heap, or anonymous by size."""
    found: Counter[str] = Counter()
    kind = ""
    for line in _read(f"/proc/{pid}/smaps").splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            parts = rest.split(maxsplit=4)
            name = _kind(parts[4].strip()) if len(parts) > 4 else ""
            size = next(text for most, text in _MIB if (last - first) >> 20 < most)
            kind = name or f"anonymous, {size}"
        elif head == "Rss:":
            found[kind] += int(rest.split()[0]) * 1024 / 1e6  # type: ignore[assignment]
    return found


def _left_behind(
    family: Family, before: set[str], seen: set[str], run: Path, temporary: Path
) -> Left:
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    while family.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    left = Left()
    for pid in family.processes():
        left.processes.append(" ".join(command_line(pid))[:200])
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    now = set(os.listdir(_SHARED)) if Path(_SHARED).is_dir() else set()
    left.segments = sorted((now - before) & seen)
    left.strangers = sorted(now - before - seen - _held_segments())
    for path in sorted(run.rglob("*")):
        mode = path.lstat().st_mode
        special = stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)
        if special or path.name.startswith(".") or path.suffix in (".tmp", ".part"):
            left.in_run.append(str(path.relative_to(run)))
    left.temporary = sorted(path.name for path in temporary.iterdir())
    return left


def _held_segments() -> set[str]:
    """By any process that can be looked at."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            found |= {_segment(line) for line in _read(f"/proc/{name}/maps").splitlines()}
    return found


def _segment(text: str) -> str:
    """Name of the shared memory at the end of `text`; '' for files in folders that lie there."""
    name = text.partition(_SHARED)[2]
    return "" if "/" in name else name


def _kind(target: str) -> str:
    """What a descriptor or mapping is: `socket`, `anon_inode:[eventpoll]`, or a file's name."""
    if re.fullmatch(r"(socket|pipe):\[\d+\]", target):
        return target.partition(":")[0]
    name = target.rpartition("/")[2] if target.startswith("/") else target
    return re.sub(r"\d+", "N", name)


def _read(path: str) -> str:
    """'' where the process is gone, or another user's."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
