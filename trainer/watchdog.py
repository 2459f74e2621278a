"""Notices what a collective cannot tell: which rank a run is waiting for, and why.

Each rank's watchdog thread leaves a sign of life in the store that torchrun keeps (a counter, the
step, and what the rank is doing). Rank 0 looks at all of them, the others at rank 0's. Who finds a
rank that is silent, or one that does not come on, writes a verdict into the store; every rank reads
it, leaves its stacks and collectives in `hangs/`, and ends. A rank that fails by itself writes the
verdict too, so that other nodes hear of it at once. No clocks are compared between machines.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from data_pipeline.progress import print_line
from trainer.distributed import Ranks, broadcast_object

EXIT_STATUS = 1
# in the order of a step, which ends with the number of finished steps going up: before what
# comes between it and the next one
_ACTIVITIES = (
    *("starting", "evaluating", "saving", "waiting for data", "computing", "agreeing", "ending"),
)


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life.

    Attributes:
        count: grows with every sign.
        step, micro: finished steps, and micro-batches of the next one; negative while evaluating:
            forward passes that are left.
        activity: what the rank is doing, of `_ACTIVITIES`.
        seconds: for how long it has been at that.
        host, namespace, pid, born: of its process; born is the kernel's start time, since numbers
            recur.
    """

    count: int
    step: int
    micro: int
    activity: int
    seconds: float
    host: str
    namespace: str
    pid: int
    born: int

    @property
    def place(self) -> tuple[int, int, int]:
        """How far the rank is: the run waits for who is behind."""
        return self.step, self.micro, self.activity

    def pack(self) -> str:
        return json.dumps([getattr(self, name) for name in self.__dataclass_fields__])

    @classmethod
    def unpack(cls, data: bytes) -> "Sign":
        return cls(*json.loads(data))


class Watchdog:
    """Of one rank; a context manager around its training.

    Args:
        ranks: of the run.
        timeout_seconds: without a sign of life, or at one activity, until the run is ended.
        hangs: folder for stacks and collectives.
        start_seconds: the limit at one activity until the first step is done.
    """

    def __init__(
        self, ranks: Ranks, timeout_seconds: float, start_seconds: float, hangs: Path
    ) -> None:
        self._ranks, self._timeout, self._hangs = ranks, timeout_seconds, hangs
        self._patience = max(timeout_seconds, start_seconds)
        self._step, self._micro, self._activity = 0, 0, 0
        self._since = time.monotonic()
        self._process = _this_process()
        self._interval = min(2.0, timeout_seconds / 10)
        self._store = _own_store(ranks, timeout_seconds)
        self._done = threading.Event()
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its last count, and when it was new
        self._signs: dict[int, Sign] = {}
        self._told, self._telling = False, threading.Lock()
        self._own: set[str] = set()  # verdicts that this rank came to
        self._heard: set[str] = set()  # verdicts of ranks that failed by themselves
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._store is not None:
            self._store.set(f"sign/{self._ranks.rank}", self._sign(0).pack())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def at(self, activity: str, step: int, micro: int = 0) -> None:
        """Says what this rank does from now on, after so many steps and micro-batches.

        Said again with another `micro`, it tells that the rank comes on.
        """
        if step > self._step and self._activity:
            self._patience = self._timeout
        self._step, self._micro, self._activity = step, micro, _ACTIVITIES.index(activity)
        self._since = time.monotonic()

    def fail(self, message: str) -> None:
        """Tells all ranks why this one ends, unless another one was first.

        Args:
            message: begins with "rank N: ", N being where the cause is.
        """
        self._own.add(message)
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.compare_set("verdict", "", message)

    def explain_lost_connection(self, reason: str) -> str:
        """Why a collective broke: another rank's verdict, or a rank whose process is gone."""
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):  # the store may have gone as well
                if verdict := self._verdict():
                    return verdict
            if gone := self._dead_neighbours():
                return (
                    f"rank {gone[0]}: its process has ended without a word, in step "
                    f"{self._step + 1}; it was killed, perhaps for want of memory"
                )
            time.sleep(0.1)
        return (
            f"rank {self._ranks.rank}: the connection to another rank broke in step "
            f"{self._step + 1} ({reason}); what ended there is in that rank's output"
        )

    def tell(self, verdict: str, more: str = "") -> None:
        """Says once on the terminal what happened, on the rank whose part that is."""
        with self._telling:
            if not self._told and self._should_say(verdict):
                say(verdict + more)
            self._told = True

    def _should_say(self, verdict: str) -> bool:
        """One rank tells the terminal, unless the culprit has done so."""
        culprit = verdict.partition(":")[0]
        speaker = 1 if culprit == "rank 0" and self._ranks.world_size > 1 else 0
        if self._ranks.rank != speaker:
            return False
        number = culprit.removeprefix("rank ")
        sign = self._signs.get(int(number)) if number.isdigit() else None
        return verdict not in self._heard or sign is None or not self._is_here(sign)

    # --- the thread ---

    def _watch(self) -> None:
        count, last_contact = 0, time.monotonic()
        while not self._done.wait(self._interval):
            count += 1
            try:
                verdict = self._look(count)
                last_contact = time.monotonic()
            except (RuntimeError, OSError):
                if self._done.is_set():
                    return
                verdict = None
                if time.monotonic() - last_contact > self._timeout:
                    verdict = (
                        f"rank 0: the store that is kept there has not answered for "
                        f"{self._timeout:g} s; rank 0 was stopped, or its machine is gone or cut "
                        "off"
                    )
            if verdict and not self._done.is_set():
                self._end(verdict)

    def _look(self, count: int) -> str:
        """Leaves a sign, reads others'; the verdict, if there is one."""
        own = self._sign(count)
        if self._store is None:
            return self._of_slow(own)
        self._store.set(f"sign/{self._ranks.rank}", own.pack())
        if verdict := self._verdict():
            return verdict
        world = range(self._ranks.world_size)
        others = [rank for rank in world if rank != self._ranks.rank]
        watched = others if self._ranks.is_main else [0]
        self._read_signs(watched)
        verdict = self._of_silent(watched) or (self._ranks.is_main and self._of_slow(own)) or ""
        if verdict:
            self._own.add(verdict)
            self._store.compare_set("verdict", "", verdict)
            return self._verdict() or verdict
        return ""

    def _read_signs(self, watched: Sequence[int]) -> None:
        assert self._store is not None
        present = [rank for rank in watched if self._store.check([f"sign/{rank}"])]
        if not present:
            return
        found = self._store.multi_get([f"sign/{rank}" for rank in present])
        for rank, data in zip(present, found, strict=True):
            sign = Sign.unpack(data)
            if self._seen.get(rank, (-1, 0))[0] != sign.count:
                self._seen[rank] = sign.count, time.monotonic()
            self._signs[rank] = sign

    def _of_silent(self, watched: Sequence[int]) -> str:
        now = time.monotonic()
        for rank in watched:
            if rank in self._seen and now - self._seen[rank][1] > self._timeout:
                sign = self._signs[rank]
                return (
                    f"rank {rank}: no sign of life for {self._timeout:g} s (process {sign.pid} on "
                    f"{sign.host}, last heard of in step {sign.step + 1}, "
                    f"{_ACTIVITIES[sign.activity]}); it was stopped, or its machine is gone or "
                    "overloaded"
                )
        return ""

    def _of_slow(self, own: Sign) -> str:
        """Ranks that are behind while nothing moves; all, where none is behind."""
        signs = {**self._signs, self._ranks.rank: own}
        if len(signs) < self._ranks.world_size:
            return ""
        if min(sign.seconds for sign in signs.values()) < self._patience:
            return ""
        last = min(sign.place for sign in signs.values())
        behind = [rank for rank, sign in sorted(signs.items()) if sign.place == last]
        sign = signs[behind[0]]
        who = f"rank {behind[0]}: " if len(behind) == 1 else ""
        others = "" if len(behind) == 1 else f"; so do {len(behind) - 1} more ranks"
        return (
            f"{who}nothing has moved for {self._patience:g} s: rank {behind[0]} has been "
            f"{_ACTIVITIES[sign.activity]} in step {sign.step + 1} for {sign.seconds:.0f} s{others}"
        )

    def _verdict(self) -> str:
        if self._store is None or not self._store.check(["verdict"]):
            return ""
        text: bytes = self._store.get("verdict")
        verdict = text.decode()
        if verdict not in self._own:
            self._heard.add(verdict)
        return verdict

    def _dead_neighbours(self) -> list[int]:
        """Ranks of this node whose process has ended."""
        if self._store is None:
            return []
        with contextlib.suppress(RuntimeError):
            self._read_signs([r for r in range(self._ranks.world_size) if r != self._ranks.rank])
        return [
            rank
            for rank, sign in sorted(self._signs.items())
            if self._is_here(sign) and _start_time(sign.pid) != sign.born
        ]

    # --- the end ---

    def _end(self, verdict: str) -> None:
        """Leaves traces and ends this process, wherever its main thread is."""
        dumped = self._dump()
        culprit = verdict.partition(":")[0]
        self.tell(verdict, f". What the other ranks were doing: {dumped}")
        time.sleep(3 * self._interval)  # for the others' traces, before a launcher ends them
        self._kill_silent(culprit)
        record_for_launcher(verdict)
        os._exit(EXIT_STATUS)

    def _dump(self) -> Path:
        folder = self._hangs / f"step-{self._step:08d}"
        with contextlib.suppress(OSError):  # traces are not worth losing the verdict for
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank-{self._ranks.rank:05d}.txt").open("w") as file:
                file.write(f"{_ACTIVITIES[self._activity]} in step {self._step + 1}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            recorded = _recorded_collectives()
            if recorded:
                (folder / f"collectives-{self._ranks.rank:05d}.json").write_bytes(recorded)
        return folder

    def _kill_silent(self, culprit: str) -> None:
        """A stopped process keeps its launcher waiting; its neighbour ends it."""
        number = culprit.removeprefix("rank ")
        sign = self._signs.get(int(number)) if number.isdigit() else None
        if sign is None or sign.pid == os.getpid() or not self._is_here(sign):
            return
        if _start_time(sign.pid) == sign.born:
            with contextlib.suppress(OSError):
                os.kill(sign.pid, signal.SIGKILL)

    def _sign(self, count: int) -> Sign:
        seconds = time.monotonic() - self._since
        return Sign(count, self._step, self._micro, self._activity, seconds, *self._process)

    def _is_here(self, sign: Sign) -> bool:
        """Whether that process can be seen, and ended, from here."""
        return (sign.host, sign.namespace) == self._process[:2]


def say(message: str) -> None:
    """One line of maskbank on the terminal."""
    print_line(f"maskbank: {message}")


def record_for_launcher(message: str) -> None:
    """Leaves the reason where torchrun looks for it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        details = {"py_callstack": "", "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            text = json.dumps({"message": {"message": message, "extraInfo": details}})
            Path(path).write_text(text, encoding="utf-8")


def _own_store(ranks: Ranks, timeout_seconds: float) -> Any:
    """A connection of its own to the store of the run, None with one rank."""
    if ranks.world_size == 1:
        return None
    limit = timedelta(seconds=max(1.0, min(30.0, timeout_seconds / 2)))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=limit)
    # torchrun keeps its store over restarts: what was said before must not be read again
    return PrefixStore(f"maskbank/{broadcast_object(uuid.uuid4().hex, ranks)}", store)


def _recorded_collectives() -> bytes:
    """What torch's flight recorder holds, as JSON."""
    dump: Callable[[], bytes] | None = getattr(
        torch._C._distributed_c10d, "_dump_fr_trace_json", None
    )
    if dump is None or not dist.is_initialized():
        return b""
    try:
        return dump()
    except RuntimeError:
        return b""


def _this_process() -> tuple[str, str, int, int]:
    pid = os.getpid()
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), namespace, pid, _start_time(pid) or 0


def _start_time(pid: int) -> int | None:
    """When a process was started, in ticks of the kernel; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])
