"""Worker processes that end with their parent, whatever happens to either."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from data_pipeline.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], processes: int
) -> Iterator[Result]:
    """Results of `function` on every task, in the order in which they are ready.

    With one process everything is done here. Only as many tasks are taken from the iterable as
    keep the workers busy. An error or Ctrl-C ends all workers at once, in the middle of a task.

    Args:
        function: of a module, so that workers find it.
        tasks: picklable.
        processes: workers.

    Raises:
        InputError: a worker was killed from outside.
    """
    if processes == 1:
        yield from map(function, tasks)
        return
    # spawn: forking a process that may have threads (BLAS, progress bar) can deadlock its child
    context = multiprocessing.get_context("spawn")
    alive, our_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, initializer=_watch_parent, initargs=(alive,))
    try:
        yield from _keep_busy(pool, function, iter(tasks), 2 * processes)
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed from outside, often for lack of memory; run the same "
            "command again, with fewer --processes: what is finished is kept"
        ) from None
    except BaseException:
        our_end.close()  # an error or Ctrl-C: workers leave their tasks and end at once
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        our_end.close()
        alive.close()


def _keep_busy(
    pool: ProcessPoolExecutor,
    function: Callable[[Task], Result],
    tasks: Iterator[Task],
    most: int,
) -> Iterator[Result]:
    pending: set[Future[Any]] = set()
    while True:
        for task in islice(tasks, most - len(pending)):
            with _interrupts_held():
                pending.add(pool.submit(function, task))
        if not pending:
            return
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started within never see Ctrl-C, which is the parent's to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch_parent(alive: Connection) -> None:
    """Ends this worker as soon as the other end of the pipe is closed or its owner is dead."""

    def end() -> None:
        alive.poll(None)
        os._exit(1)

    threading.Thread(target=end, name="parent", daemon=True).start()
