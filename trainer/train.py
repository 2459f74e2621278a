"""Training: `torchrun --nproc-per-node=N -m trainer.train --recipe NAME key=value …`.

The same command started again goes on from the newest checkpoint, on any number of ranks.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

if __name__ == "__main__":  # torch takes seconds to load: a Ctrl-C then needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from data_pipeline.progress import log_above_bars
from trainer.allocator import keep_freed_memory
from trainer.checkpoint_writer import OtherRankFailed
from trainer.clock import Clock
from trainer.config import TrainConfig, add_arguments, load_config
from trainer.distributed import (
    Ranks,
    barrier,
    cores_per_rank,
    end_ranks,
    same_on_all_ranks,
    start_ranks,
)
from trainer.messages import say_end, say_start
from trainer.objective import contrast_views
from trainer.online import OnlineEvaluation
from trainer.precision import settle_precision
from trainer.preemption import StopRequest
from trainer.preflight import Plan, plan_run
from trainer.restarts import NoRestartHelps, end_launcher
from trainer.resume import find_checkpoint, prepare_run
from trainer.run_lock import alone_in
from trainer.state import TrainState
from trainer.watchdog import Watchdog, record_for_launcher, say

logger = logging.getLogger(__name__)
_SECONDS_FOR_LAST_WORDS = 5.0


def train(
    config: TrainConfig, plan: Plan, ranks: Ranks, stop: StopRequest, watchdog: Watchdog
) -> int:
    """Trains until the run is done or was asked to stop; returns the number of finished steps.

    Raises:
        InputError: shards or checkpoint cannot be read, perhaps on this rank alone.
        OSError: a checkpoint cannot be written, on every rank.
        FloatingPointError: losses are not finite any more, on every rank at the same step.
    """
    barrier(ranks)  # every rank has looked before one writes
    stop.begin()
    if ranks.is_main:
        say_start(config, plan, ranks)
    for warning in plan.warnings if ranks.is_main else ():
        logger.warning(warning)
    checkpoint = find_checkpoint(plan, ranks)
    prepare_run(config, checkpoint, ranks)
    state = TrainState(config, plan, checkpoint, ranks)
    stream, log = state.stream(), state.metrics_log()
    clock = Clock(config.data.batch_size, stream, state.seconds, state.step)
    step, micro_batches = state.step, config.optim.accumulate
    engine, bank = state.engine, state.bank
    online = OnlineEvaluation(config, plan, engine, ranks, watchdog)
    try:
        online.catch_up(step, log, clock)
        while step < plan.total_steps:
            engine.update_momentum(config.model.momentum)
            for micro in range(micro_batches):
                watchdog.at("waiting for data", step, micro)
                batch: Batch = next(stream)
                watchdog.at("computing", step, micro)
                at = state.begin(step, micro)
                chosen = state.choose_pixels(batch, at)
                moved_pixels = bank.prefetch(chosen.pixels_of_ranks)
                with engine.accumulating(more_follow=micro + 1 < micro_batches):
                    query = engine.forward(batch.query_image)
                    key = state.embed_keys(batch, at)
                    losses = contrast_views(query, key, batch, chosen, bank, ranks, config.loss)
                    engine.backward(losses.total)
                state.add(losses, moved_pixels)
            watchdog.at("agreeing", step, micro_batches)
            agreed = state.finish_step(step, stop.asked())
            step += 1

            if step % config.run.log_every == 0 or step == plan.total_steps:
                state.add_exchange()
                row = {"step": step, "epoch": step / plan.steps_per_epoch, "lr": state.lr(step - 1)}
                row |= state.meter.means(micro_batches, config.loss)
                row |= clock.read(step, plan.total_steps) | state.describe_data(stream)
                if log is not None:
                    log.write(row)
            if log is not None:
                log.advance(step)
            online.evaluate_if_due(step, log, clock, leave_out=agreed.stop)
            watchdog.at("saving", step)
            if step % config.run.checkpoint_every == 0 or step == plan.total_steps or agreed.stop:
                state.seconds = clock.total_seconds
                state.save(step)
            if agreed.stop:
                break
        state.finish_saving()
        stop.obeyed()
    finally:
        watchdog.at("ending", step)
        stream.close()
        if log is not None:
            log.close()
    if ranks.is_main:
        say_end(config, plan, step, clock.total_seconds, stop.reason)
    return step


@contextmanager
def _errors_told(ranks: Ranks, watchdog: Watchdog) -> Iterator[None]:
    """Ends this rank with one line that names the rank and the cause; the others hear of it."""
    try:
        yield
    except OtherRankFailed:
        time.sleep(_SECONDS_FOR_LAST_WORDS)  # launchers end all ranks with the first that leaves
        _leave(1)
    except (InputError, OSError, FloatingPointError) as error:
        status, message = (2 if isinstance(error, InputError) else 1), str(error)
        if not message.startswith("rank "):
            message = f"rank {ranks.rank}: {message}"
        watchdog.fail(message)
        shared = isinstance(error, FloatingPointError | NoRestartHelps)
        if ranks.is_main or not shared:  # what is the same on every rank is said once
            say(message)
        record_for_launcher(message)
        if isinstance(error, FloatingPointError | NoRestartHelps):
            end_launcher()
        _leave(status)
    except RuntimeError as error:
        # torch's errors of broken connections have no type of their own
        if not _is_connection_error(error):
            watchdog.fail(f"rank {ranks.rank}: {type(error).__name__}: {error}"[:2000])
            raise
        message = watchdog.explain_lost_connection(str(error).splitlines()[0][:200])
        watchdog.fail(message)
        watchdog.tell(message)
        record_for_launcher(message)
        _leave(1)


def _is_connection_error(error: RuntimeError) -> bool:
    text = str(error).lower()
    words = ("connection", "gloo", "nccl", "timed out", "remote", "socket")
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in words)


def _leave(status: int) -> None:
    """Ends the process without waiting for threads that wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trainer.train", description=__doc__)
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    log_above_bars()
    logging.getLogger("trainer").setLevel(logging.INFO)
    try:
        with same_on_all_ranks():
            config = settle_precision(load_config(options.recipe, options.config, options.settings))
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
            plan = plan_run(config, world_size, int(os.environ.get("RANK", "0")))
        hangs, limits = plan.run / "hangs", config.run
        seconds = (limits.timeout_seconds, limits.start_timeout_seconds)
        # the watchdog comes first, since it knows whom the others wait for
        ranks = start_ranks(limits.device, 1.2 * max(seconds) + 30, hangs)
    except InputError as error:
        say(str(error))
        record_for_launcher(str(error))
        end_launcher()
        sys.exit(2)
    if ranks.device.type == "cpu":
        torch.set_num_threads(config.run.threads or cores_per_rank())
        keep_freed_memory()
    watchdog, stop = Watchdog(ranks, *seconds, hangs), StopRequest(plan.run, ranks)
    # a launcher's SIGTERM, which follows another rank's death, must not cut short the last words
    with watchdog, stop, _errors_told(ranks, watchdog), alone_in(plan.run, ranks):
        train(config, plan, ranks, stop, watchdog)
    end_ranks()


if __name__ == "__main__":
    main()
