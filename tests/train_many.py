"""Several runs of `trainer.train` one after the other in one group of ranks: `-m tests.train_many
FILE`.

FILE holds JSON: a list of objects with `settings` (`key=value`, after the recipe demo_cpu) and
`bad_batch` (the batch of this start whose images on the last rank are no numbers; 0 for none).
What goes wrong in a run is left in its directory as `error.txt`, and the next run begins.
"""

import json
import sys
import traceback
from pathlib import Path

import torch

from data_pipeline.loader import BatchStream
from tests.faulty_train import at_batch
from trainer.config import load_config
from trainer.distributed import Ranks, end_ranks, start_ranks
from trainer.precision import settle_precision
from trainer.preemption import StopRequest
from trainer.preflight import plan_run
from trainer.run_lock import alone_in
from trainer.train import train
from trainer.watchdog import Watchdog


def train_one(settings: list[str], bad_batch: int, ranks: Ranks) -> None:
    config = settle_precision(load_config("demo_cpu", None, settings))
    plan = plan_run(config, ranks.world_size, ranks.rank)
    if bad_batch and ranks.rank == ranks.world_size - 1:
        at_batch("nan", bad_batch)
    limits = config.run.timeout_seconds, config.run.start_timeout_seconds
    watchdog, stop = Watchdog(ranks, *limits, plan.run / "hangs"), StopRequest(plan.run, ranks)
    try:
        with watchdog, stop, alone_in(plan.run, ranks):
            train(config, plan, ranks, stop, watchdog)
    except Exception as error:
        # what is wrong is so on every rank: they stay together
        traceback.print_exc()
        (plan.run / "error.txt").write_text(f"{type(error).__name__}: {error}\n")


def main() -> None:
    ranks = start_ranks("cpu", 60)
    torch.set_num_threads(1)
    plain = BatchStream.__next__
    for run in json.loads(Path(sys.argv[1]).read_text()):
        train_one(run["settings"], run["bad_batch"], ranks)
        BatchStream.__next__ = plain  # type: ignore[method-assign]
    end_ranks()


if __name__ == "__main__":
    main()
