"""Which checkpoint a run goes on from: agreed by all ranks, and whole."""

import logging
from pathlib import Path

from data_pipeline.errors import InputError
from trainer.checkpoint import (
    Checkpoint,
    complete_checkpoints,
    remove_leftovers,
    set_aside,
)
from trainer.config import TrainConfig
from trainer.distributed import Ranks, any_rank, barrier, broadcast_object
from trainer.preflight import Plan
from trainer.restarts import is_restart, note_start

log = logging.getLogger(__name__)


def find_checkpoint(plan: Plan, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint whose bytes are what was written; a collective.

    Rank 0's listing counts, since a network file system may show others an older one. The ranks
    share the reading. What is damaged is renamed `….damaged`, said, and passed over.

    Raises:
        InputError: there are checkpoints, but none is whole.
    """
    found = broadcast_object(complete_checkpoints(plan.run), ranks)
    for checkpoint in reversed(found):
        problem = checkpoint.problem(lambda n: n % ranks.world_size == ranks.rank)
        if problem:
            log.warning(
                "rank %d: checkpoint of step %d is damaged: %s",
                *(ranks.rank, checkpoint.step, problem),
            )
        if not any_rank(bool(problem), ranks):
            if checkpoint is not found[-1] and ranks.is_main:
                log.warning("going on from the one before, of step %d", checkpoint.step)
            return checkpoint
        if ranks.is_main and checkpoint.problem():
            set_aside(checkpoint)
        elif ranks.is_main:
            log.warning(
                "rank 0 can read all of it: the file system shows ranks different things; "
                "it stays where it is"
            )
    if found:
        raise InputError(
            f"all {len(found)} checkpoints of {plan.run} are damaged; they are kept as *.damaged. "
            "Copy whole ones back, or start the same command again to begin anew"
        )
    return None


def prepare_run(config: TrainConfig, checkpoint: Checkpoint | None, ranks: Ranks) -> None:
    """Notes the start and clears what a killed run was writing; a collective.

    Raises:
        NoRestartHelps: restarts gain nothing.
    """
    run = Path(config.run.directory)
    step = checkpoint.step if checkpoint is not None else 0
    automatic = broadcast_object(is_restart(), ranks)
    if ranks.is_main:
        remove_leftovers(run)
        note_start(run, step, ranks.world_size, automatic, config.run.max_fruitless_restarts)
        if checkpoint is not None:
            log.info("going on from step %s", f"{step:,}")
    barrier(ranks)
