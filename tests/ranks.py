"""Runs a function on real gloo ranks: distributed code is tested on processes, never on mocks."""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import Ranks

# Imported once, where installed, in the process that all ranks are forked from: they then start in
# milliseconds.
PRELOADED = [
    "pytest",
    "torch",
    "torch.distributed",
    "trainer.distributed",
    "trainer.train",
    "data_pipeline.whole_images",
    "evaluation.kmeans",
    "evaluation.linear_probe",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports the compiler
    "hypothesis",
    "timm",
    "tests.ranks",
]


class RankError(RuntimeError):
    """A rank failed; `rank` says which. Its own exception is the cause, where it can be pickled."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """What `function(ranks, *args)` returns on each of `world_size` gloo ranks, by rank.

    One rank runs in this process, without a process group. More are processes forked from a
    server that keeps the environment of its start, so that a later `monkeypatch.setenv` does not
    reach them.

    Args:
        function: of a module (not a lambda or a local one: ranks import it by name).
        world_size: ranks to start, one thread each.
        args: anything that pickles; every rank gets a copy.
        timeout: seconds until ranks that have not ended are killed.

    Raises:
        RankError: a rank raised or died; the others are killed.
        TimeoutError: with the stacks of the ranks that had not ended.
    """
    if world_size == 1:
        return [_run_here(function, args)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # pickled here, because torch would otherwise share the tensors' memory between the processes
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        processes = [
            context.Process(
                target=_rank_main, args=(rank, world_size, folder, call, timeout), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait_for(processes, folder, time.monotonic() + timeout, timeout)
            return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(world_size)]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _run_here(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(Ranks(0, 1, torch.device("cpu")), *args)
    except Exception as error:
        raise RankError(0, _described(error)) from error
    finally:
        torch.set_num_threads(threads)


def _rank_main(rank: int, world_size: int, folder: Path, call: bytes, timeout: float) -> None:
    """One rank: leaves what the function returned, or its failure, as a file of the folder."""
    torch.set_num_threads(1)
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # gloo else asks what the host's name resolves to
    with _stack(folder, rank).open("w") as stack:
        faulthandler.dump_traceback_later(max(0.5, 0.9 * timeout), file=stack)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder / 'store'}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=2 * timeout),
            )
            function, args = pickle.loads(call)
            value = function(Ranks(rank, world_size, torch.device("cpu")), *args)
            _write(_result(folder, rank), pickle.dumps(value))
            dist.barrier()  # a rank that leaves early breaks its peers' last collective
            dist.destroy_process_group()
        except BaseException as error:
            # written before this rank's sockets close, so that the first failure is the oldest
            failure = (time.monotonic(), _described(error), _pickled(error))
            _write(_failure(folder, rank), pickle.dumps(failure))
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()


def _wait_for(
    processes: list[ForkServerProcess], folder: Path, deadline: float, timeout: float
) -> None:
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        ready = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = [
                f"rank {rank}:\n{_stack(folder, rank).read_text()}"
                for rank in running.values()
                if _stack(folder, rank).is_file()
            ]
            raise TimeoutError(
                f"ranks {sorted(running.values())} had not ended after {timeout:g} s\n"
                + "\n".join(stacks)
            )
        ended = [running.pop(sentinel) for sentinel in ready if isinstance(sentinel, int)]
        if any(processes[rank].exitcode for rank in ended):
            _raise_first(processes, folder)


def _raise_first(processes: list[ForkServerProcess], folder: Path) -> None:
    """Raises the failure that the others follow from."""
    for rank, process in enumerate(processes):
        if process.exitcode and not _failure(folder, rank).is_file():
            raise RankError(rank, f"died with exit code {process.exitcode}")
    failures = {
        rank: pickle.loads(_failure(folder, rank).read_bytes())
        for rank in range(len(processes))
        if _failure(folder, rank).is_file()
    }
    rank = min(failures, key=lambda rank: failures[rank][0])
    _, text, error = failures[rank]
    raise RankError(rank, text) from (None if error is None else pickle.loads(error))


def _described(error: BaseException) -> str:
    trace = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}\n{trace}"


def _pickled(error: BaseException) -> bytes | None:
    """The exception, if it survives pickling."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return None
    return data


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}"


def _failure(folder: Path, rank: int) -> Path:
    return folder / f"failure-{rank}"


def _stack(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: the parent may look at any moment."""
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.rename(path)
