"""One run at a time in a run directory, and whose turn it is when SLURM has started it anew."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.files import FolderInUse, only_writer
from trainer.distributed import Ranks
from trainer.preemption import STOP_FILE
from trainer.watchdog import say

_PAUSE = 0.5  # seconds between two tries


@contextmanager
def alone_in(run: Path, ranks: Ranks) -> Iterator[None]:
    """Two runs in one directory would destroy each other's checkpoints.

    A job that SLURM requeued may find its former self still at work, on a node whose slurmd died
    and whose processes did not. That one is asked to stop, with a checkpoint, and waited for.

    Raises:
        InputError: another process is training there.
        TimeoutError: the former self does not stop.
    """
    if not ranks.is_main:
        yield
        return
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    # who is stuck ends itself after `timeout_seconds`
    patience = 1.5 * ranks.timeout_seconds if requeued else 0.0
    deadline, waits = time.monotonic() + patience, False
    lock = ExitStack()
    while True:
        try:
            lock.enter_context(only_writer(run))
            break
        except FolderInUse:
            if not requeued:
                raise InputError(
                    f"another process is training in {run} at this moment; wait until it has "
                    "ended, end it, or choose another run.directory"
                ) from None
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the job was requeued, but ranks of its former start are still training in "
                    f"{run} and do not stop; end them by hand on the nodes that it had before"
                ) from None
        if not waits:
            say(f"ranks of this job's former start are still at work in {run}; asking them to stop")
            waits = True
        (run / STOP_FILE).touch()
        time.sleep(_PAUSE)
    with lock:
        yield
