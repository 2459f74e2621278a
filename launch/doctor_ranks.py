"""Ranks that find each other, compare clocks and add numbers; everything of it that needs torch.

`python -m launch.doctor_ranks ROLE …`, where the role is

- start: torchrun for ranks on this machine, each of which is `launch.doctor_join`;
- work: one rank: joins, measures, and leaves its result in the store;
- collect: beside rank 0: waits for all results, whatever becomes of the ranks, and writes them;
- post: leaves word in the store that a rank's `work` died.

Keys of the store: arrived/R, ping/R/I, pong/R/I, clock/R, go, stage/R, result/R, failed/R, done.
"""

import argparse
import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.doctor_folder import TRACES
from launch.doctor_network import VARIABLES, connected_interfaces, read_interfaces
from launch.doctor_place import Place, find_place
from launch.doctor_process import describe, live_at_most, waiting

PINGS = 5
SMALL_ROUNDS = 20
LARGE_NUMBERS = 16_000_000  # of 4 bytes: 64 MB
_SECONDS_OF_LARGE = 3.0  # further rounds while it takes no longer
_SECONDS_FOR_OTHERS = 3.0  # to say what happened to them, once a rank has failed
_SECONDS_TO_RESOLVE = 3.0  # a name; name servers have hiccups
_SECONDS_TO_SEE = 5.0  # a new file, through the caches of a network disk
STORE_UNREACHED = 3  # exit status of `work`: nobody can be told


def connect(place: Place, seconds: float, serve: bool = False) -> Any:
    """The store that all ranks of this check share.

    Args:
        seconds: to wait for it, and for each key later.
        serve: whether this process holds it, unless torchrun does.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    serve = serve and not place.agent_store
    if not serve:
        _wait_for_server(place, seconds)
    store = TCPStore(
        place.address,
        place.port,
        None,
        is_master=serve,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
    )
    return PrefixStore("maskbank-doctor", store)


def _wait_for_server(place: Place, seconds: float) -> None:
    """Until the store answers; torch would say less, and later than it was told.

    Raises:
        OSError: it does not, or its name leads nowhere.
    """
    server = f"the store of rank 0, {place.address}:{place.port}"
    unknown, start = 0, time.monotonic()
    problem = ""
    for left in waiting(seconds, pause=0.2):
        try:
            socket.create_connection((place.address, place.port), timeout=min(left, 5.0)).close()
            return
        except socket.gaierror as error:
            unknown += 1
            if unknown >= 3 and time.monotonic() - start > _SECONDS_TO_RESOLVE:
                raise OSError(f"{place.address} cannot be resolved: {error.strerror}") from None
            problem = str(error.strerror)
        except OSError as error:
            problem = error.strerror or "no answer"
    raise OSError(f"{server}, was not reached within {seconds:.0f} s: {problem}")


def put(store: Any, key: str, value: Any) -> None:
    store.set(key, json.dumps(value))


def get(store: Any, key: str, seconds: float) -> Any:
    """The value of a key once it is there; torch's DistStoreError where it never is."""
    store.wait([key], timedelta(seconds=max(0.01, seconds)))
    return json.loads(store.get(key))


def read_clock(
    store: Any, rank: int, seconds: float, clock: Callable[[], float] = time.time
) -> dict[str, float]:
    """How far this rank's clock is ahead of the collector's, and by how much that may be wrong.

    The quickest of a few round trips counts: its error is half of its time at the most (as NTP).
    """
    best = {"offset": 0.0, "error": float("inf")}
    end = time.monotonic() + seconds
    for number in range(PINGS):
        sent = clock()
        start = time.perf_counter()
        put(store, f"ping/{rank}/{number}", True)
        theirs = get(store, f"pong/{rank}/{number}", end - time.monotonic())
        error = (time.perf_counter() - start) / 2
        if error < best["error"]:
            best = {"offset": sent + error - theirs, "error": error}
    put(store, f"clock/{rank}", best)
    return best


def answer_clock(
    store: Any, rank: int, seconds: float, clock: Callable[[], float] = time.time
) -> dict[str, float] | None:
    """The collector's part of `read_clock`; None for a rank that does not ask."""
    import torch.distributed as dist

    end = time.monotonic() + seconds
    try:
        for number in range(PINGS):
            get(store, f"ping/{rank}/{number}", end - time.monotonic())
            put(store, f"pong/{rank}/{number}", clock())
        found: dict[str, float] = get(store, f"clock/{rank}", end - time.monotonic())
    except dist.DistStoreError:
        return None
    return found


def work(place: Place, options: argparse.Namespace) -> int:
    """One rank, from joining to its result."""
    end = time.monotonic() + options.patience + options.seconds
    try:
        store = connect(place, options.patience + 0.6 * options.seconds)
    except Exception as error:
        print(describe(error), file=sys.stderr)
        return STORE_UNREACHED
    threading.Thread(target=_leave_when_done, args=(place, end), daemon=True).start()
    stage = _Stage(store, place.rank)
    try:
        stage("joining")
        findings = json.loads(Path(options.findings).read_text()) if options.findings else None
        about = {
            "host": os.uname().nodename,
            "node": place.node,
            "findings": findings,
            "interfaces": read_interfaces(),
            "chosen": {name: os.environ.get(name) for name in VARIABLES.values()},
        }
        put(store, f"arrived/{place.rank}", about)
        read_clock(store, place.rank, end - time.monotonic())
        go = get(store, "go", end - time.monotonic())
        if go["seconds"]:
            result = _measure(store, place, options, stage, go["seconds"])
            put(store, f"result/{place.rank}", result)
    except Exception as error:
        failure = {"reason": describe(error), "stage": stage.name, "time": time.time()}
        put(store, f"failed/{place.rank}", failure)
    with contextlib.suppress(Exception):  # who leaves early breaks the others' last collective
        get(store, "done", end - time.monotonic())
    _flush_and_leave()
    return 0


def _measure(
    store: Any, place: Place, options: argparse.Namespace, stage: "_Stage", seconds: float
) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    stage("choosing a device")
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    if options.device == "cuda" and not on_gpu:
        raise ValueError("torch sees no GPU")
    if on_gpu and place.local_rank >= torch.cuda.device_count():
        raise ValueError(f"no GPU is left for it: there are {torch.cuda.device_count()}")
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    stage(f"connecting with {backend}")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=seconds),
        device_id=device if on_gpu else None,
    )
    found: dict[str, Any] = {"backend": backend, "device": str(device)}
    found |= reduce_numbers(place, device, stage)
    found["interfaces"] = connected_interfaces(place.port)
    found["shared"] = None
    if options.folder:
        stage("looking for the shared folder")
        found["shared"] = _share_folder(store, place, Path(options.folder), seconds)
    return found


def reduce_numbers(place: Place, device: Any, stage: Callable[[str], None]) -> dict[str, Any]:
    """Sums over all ranks, checked and timed: of one number, and of 64 MB.

    Returns:
        latency and seconds of the large one (medians), and `wrong`, the value of a wrong sum.
    """
    import torch
    import torch.distributed as dist

    right = place.world_size * (place.world_size + 1) / 2

    def timed(numbers: Any) -> float:
        numbers.fill_(place.rank + 1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    stage("adding one number")
    small = torch.empty(1, device=device)
    timed(small)
    wrong = [float(small)] if float(small) != right else []
    latency = sorted(timed(small) for _ in range(SMALL_ROUNDS))[SMALL_ROUNDS // 2]
    stage("adding 64 MB")
    large = torch.empty(LARGE_NUMBERS, device=device)
    first = timed(large)
    wrong += [float(edge) for edge in (large.min(), large.max()) if float(edge) != right]
    slowest = torch.tensor([first], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # all ranks then do as many rounds
    rounds = max(1, min(5, int(_SECONDS_OF_LARGE / float(slowest))))
    seconds = sorted(timed(large) for _ in range(rounds))[rounds // 2]
    return {"latency": latency, "large_seconds": seconds, "wrong": wrong[0] if wrong else None}


def _share_folder(store: Any, place: Place, folder: Path, seconds: float) -> str | None:
    """Whether this node sees a file that rank 0 just wrote, and its lock.

    Returns:
        own (rank 0), seen, unlocked (seen, but without the lock), missing, or None where rank 0
        cannot write.
    """
    if place.rank == 0:
        name = f"{TRACES}shared-{uuid.uuid4().hex[:12]}"
        try:
            file = (folder / name).open("x")  # stays open, and locked, as long as this process
        except OSError:
            put(store, "shared", None)
            return None
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _leavings.append((file, folder / name))
        put(store, "shared", name)
        return "own"
    if place.local_rank:
        return None
    name = get(store, "shared", seconds)
    if name is None:
        return None
    for _ in waiting(_SECONDS_TO_SEE, pause=0.2):
        with contextlib.suppress(OSError):
            os.listdir(folder)  # network disks then look again
            with (folder / name).open("r+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return "seen"
                return "unlocked"
    return "missing"


_leavings: list[tuple[Any, Path]] = []  # of rank 0, until all have seen them


def _flush_and_leave() -> None:
    for _, path in _leavings:
        path.unlink(missing_ok=True)
    sys.stdout.flush()
    os._exit(0)  # a group whose peers are gone cannot be closed in order


def _leave_when_done(place: Place, end: float) -> None:
    """Ends this process once the collector has all it wants, out of a collective that hangs too."""
    with contextlib.suppress(Exception):
        get(connect(place, end - time.monotonic()), "done", end - time.monotonic())
        _flush_and_leave()


class _Stage:
    """What this rank is doing, told to the collector."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store, self._rank, self.name = store, rank, ""

    def __call__(self, name: str) -> None:
        self.name = name
        put(self._store, f"stage/{self._rank}", name)


def collect(place: Place, options: argparse.Namespace) -> int:
    """Waits for all ranks and writes what became of them to the report file."""
    end = time.monotonic() + options.patience + 0.9 * options.seconds
    try:
        store = connect(place, options.patience + 0.6 * options.seconds, serve=True)
    except Exception as error:
        print(describe(error), file=sys.stderr)
        return STORE_UNREACHED
    everyone = range(place.world_size)
    arrive_by = options.patience + 0.6 * options.seconds
    ranks: dict[int, dict[str, Any]] = {rank: {} for rank in everyone}
    _gather(store, "arrived", ranks, arrive_by)
    here = [rank for rank in everyone if "arrived" in ranks[rank]]
    for rank in here:
        if "failed" not in ranks[rank]:
            seconds = min(5.0, max(0.1, end - time.monotonic()))
            ranks[rank]["clock"] = answer_clock(store, rank, seconds)
    all_here = len(here) == place.world_size
    seconds = max(1.0, end - time.monotonic()) if all_here else 0.0
    put(store, "go", {"seconds": seconds})
    if all_here:
        _gather(store, "result", ranks, seconds + 1.0)
    for rank in here:
        if store.check([f"stage/{rank}"]):
            ranks[rank]["stage"] = get(store, f"stage/{rank}", 1.0)
    report = {"world_size": place.world_size, "waited": arrive_by if not all_here else seconds}
    report["ranks"] = {str(rank): found for rank, found in ranks.items()}
    write_json(Path(options.report), report)
    put(store, "done", True)
    if not place.agent_store:
        time.sleep(1.0)  # it is this process that they ask
    return 0


def _gather(store: Any, kind: str, ranks: dict[int, dict[str, Any]], seconds: float) -> None:
    """Reads every rank's value of a kind, or its failure; once one failed, the rest must hurry."""
    hurry: float | None = None
    for _ in waiting(seconds):
        for rank, found in ranks.items():
            for key in (kind, "failed"):
                if key not in found and store.check([f"{key}/{rank}"]):
                    found[key] = get(store, f"{key}/{rank}", 1.0)
        if all(kind in found or "failed" in found for found in ranks.values()):
            return
        if any("failed" in found for found in ranks.values()):
            hurry = hurry or time.monotonic() + _SECONDS_FOR_OTHERS
            if time.monotonic() > hurry:
                return


def start(options: argparse.Namespace) -> int:
    """torchrun; what became of ranks that died goes into a file beside the report."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    command = ["--standalone", f"--nproc-per-node={options.nproc}", "--no-python", sys.executable]
    command.insert(1, f"--log-dir={Path(options.report).parent}")  # else it leaves one in /tmp
    command += ["-m", "launch.doctor_join", f"--parent={os.getpid()}", *join_arguments(options)]
    try:
        run(parse_args(command))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        exits = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        first = error.get_first_failure()[0]
        write_json(Path(f"{options.report}.exits"), {"first": first, "exits": exits})
    return 0


def join_arguments(options: argparse.Namespace) -> list[str]:
    """The options that a rank needs, as `add_arguments` reads them."""
    names = ("device", "folder", "seconds", "patience", "report", "findings")
    return [f"--{name}={getattr(options, name)}" for name in names]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", default="", help="that the nodes share; none if empty")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the ranks")
    parser.add_argument("--patience", type=float, default=0.0, help="further seconds to arrive")
    parser.add_argument("--report", default="")
    parser.add_argument("--findings", default="", help="JSON file of this node's findings")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: another process looks at any moment."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value))
    os.replace(part, path)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.doctor_ranks")
    parser.add_argument("role", choices=("start", "work", "collect", "post"))
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--reason", default="")
    add_arguments(parser)
    options = parser.parse_args(None if arguments is None else list(arguments))
    live_at_most(options.patience + options.seconds + 10)
    if options.role == "start":
        return start(options)
    place = find_place(os.environ)
    assert place is not None, "this role is one of a rank's"
    if options.role == "work":
        return work(place, options)
    if options.role == "collect":
        return collect(place, options)
    failure = {"reason": options.reason, "died": True, "time": time.time()}
    put(connect(place, 10.0), f"failed/{place.rank}", failure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
