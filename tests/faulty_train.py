"""`trainer.train` with a fault put into it from outside: `-m tests.faulty_train FAULT RANK N …`.

The fault befalls rank RANK when it takes its N-th batch, writes its N-th checkpoint, or evaluates
for the N-th time, after this start. What is run is the trainer as it is; only what it calls is made
to fail, as a machine would.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import trainer.checkpoint
import trainer.checkpoint_writer
from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from data_pipeline.loader import BatchStream
from trainer.train import main

AT_BATCH = ("stop", "hang", "raise", "nan", "nan-keys", "kill")
AT_EVALUATION = ("evaluating",)
AT_CHECKPOINT = ("write", "before-rename", "after-rename", "before-mark", "retire", "full-disk")


def note_time() -> None:
    """For who wants to know how long the others took to notice."""
    if "FAULT_TIME" in os.environ:
        Path(os.environ["FAULT_TIME"]).write_text(str(time.time()))


def kill_self() -> None:
    note_time()
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the kernel may take a moment


def befall(fault: str, batch: Batch) -> Batch:
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "hang":
        time.sleep(3600)
    elif fault == "raise":
        raise InputError("shard-000003.tar cannot be read (Input/output error)")
    elif fault == "kill":
        kill_self()
    elif fault == "nan":
        batch.query_image[0, 0, 0, 0] = torch.nan
    elif fault == "nan-keys":
        batch.key_image[0, 0, 0, 0] = torch.nan
    return batch


def at_batch(fault: str, number: int, times: int = 1) -> None:
    plain: Callable[[BatchStream], Batch] = BatchStream.__next__
    taken = 0

    def faulty(stream: BatchStream) -> Batch:
        nonlocal taken
        batch = plain(stream)
        taken += 1
        return befall(fault, batch) if number <= taken < number + times else batch

    BatchStream.__next__ = faulty  # type: ignore[method-assign]


def at_checkpoint(fault: str, number: int) -> None:
    """Kills in the middle of a file, around the rename, or fills the disk."""
    count = 0

    def at_number(module: Any, name: str, action: Callable[..., Any]) -> None:
        plain = getattr(module, name)

        def faulty(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                return action(plain, *arguments, **more)
            return plain(*arguments, **more)

        setattr(module, name, faulty)

    def half_written(plain: Callable[..., Any], path: Path, tensors: Any) -> None:
        plain(path, tensors)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        kill_self()

    def no_space(plain: Callable[..., Any], path: Path, tensors: Any) -> Any:
        note_time()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return plain(path, tensors)

    def after(plain: Callable[..., Any], *arguments: Any) -> None:
        plain(*arguments)
        kill_self()

    def before(plain: Callable[..., Any], *arguments: Any) -> None:
        kill_self()

    writer, checkpoint = trainer.checkpoint_writer, trainer.checkpoint
    if fault in ("write", "full-disk"):
        at_number(writer, "write_tensors", half_written if fault == "write" else no_space)
    elif fault == "before-mark":
        at_number(checkpoint, "atomic_write", before)
    elif fault == "retire":
        at_number(checkpoint.shutil, "rmtree", before)
    else:
        at_number(checkpoint.os, "rename", before if fault == "before-rename" else after)


def at_evaluation(number: int) -> None:
    """Kills in the middle of an evaluation while training."""
    from evaluation.online import OnlineKMeans

    plain, begun = OnlineKMeans._score, 0

    def faulty(evaluator: OnlineKMeans, statistics: Any) -> dict[str, float]:
        nonlocal begun
        begun += 1
        if begun == number:
            kill_self()
        return plain(evaluator, statistics)

    OnlineKMeans._score = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, rank, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if int(os.environ.get("RANK", "0")) == rank:
        kind, _, times = fault.partition("*")
        if kind in AT_BATCH:
            at_batch(kind, number, int(times or 1))
        elif kind in AT_CHECKPOINT:
            at_checkpoint(kind, number)
        elif kind in AT_EVALUATION:
            at_evaluation(number)
    main(sys.argv[4:])
