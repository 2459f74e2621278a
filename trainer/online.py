"""Evaluation of the network in training: when, and that it leaves no trace but its figures.

Evaluation stands above training, which imports nothing of it. So here is what training asks of an
evaluator, and the one place where it is found, by a name that no setting can change.
"""

import importlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from data_pipeline.errors import InputError
from data_pipeline.manifest import Manifest
from trainer.clock import Clock
from trainer.config import TrainConfig
from trainer.distributed import Ranks, broadcast_object, broadcast_values
from trainer.engine import Engine
from trainer.metrics import MetricsLog
from trainer.model import PixelOutput
from trainer.preflight import Plan
from trainer.skips import StatisticsKeeper
from trainer.watchdog import Watchdog

log = logging.getLogger(__name__)
_EVALUATOR = "evaluation.online"  # has make_evaluator, a `MakeEvaluator`


class OnlineEvaluator(Protocol):
    """Scores a network on labelled images; all ranks call it at the same steps."""

    def evaluate(
        self, network: Callable[[Tensor], PixelOutput], progress: Callable[[int, int], None]
    ) -> dict[str, float]:
        """Figures of the network as it is, the same on every rank; a collective.

        Every rank takes the same number of forward passes, whatever fails, since the passes
        themselves may be collectives.

        Args:
            network: normalised images [b, 3, S, S] to its output, without gradient.
            progress: is told of every pass, how many are done and how many there are.

        Raises:
            InputError: on every rank, if one of them cannot read its images or nothing can be
                scored; without a text on ranks that do not know the cause.
        """


class MakeEvaluator(Protocol):
    def __call__(self, config: TrainConfig, shards: Manifest, ranks: Ranks) -> OnlineEvaluator:
        """An evaluator on labelled shards."""


class OnlineEvaluation:
    """Of one run; does nothing where no shards are set for it.

    Args:
        config: of the run.
        plan: with the labelled shards.
        engine: whose network is evaluated.
        ranks: that share the work.
        watchdog: that is told of the progress.
    """

    def __init__(
        self, config: TrainConfig, plan: Plan, engine: Engine, ranks: Ranks, watchdog: Watchdog
    ) -> None:
        self._every, self._last_step = config.online.every, plan.total_steps
        self._engine, self._ranks, self._watchdog = engine, ranks, watchdog
        self._warned = False
        self._evaluator: OnlineEvaluator | None = None
        if plan.online is not None:
            make: MakeEvaluator = importlib.import_module(_EVALUATOR).make_evaluator
            self._evaluator = make(config, plan.online, ranks)

    def catch_up(self, step: int, metrics: MetricsLog | None, clock: Clock) -> None:
        """At a start after `step` steps: what no start before has evaluated; a collective.

        That is the network before training, or one whose run was asked to stop.
        """
        if self._evaluator is not None:
            known = metrics is not None and metrics.has_online(step)
            self.evaluate_if_due(step, metrics, clock, broadcast_object(known, self._ranks))

    def evaluate_if_due(
        self, step: int, metrics: MetricsLog | None, clock: Clock, leave_out: bool
    ) -> None:
        """A row of figures, if it is time for one; a collective.

        Data that cannot be read or scored does not end the run: it is warned of once, and the row
        has `online_failed` instead.

        Args:
            step: finished steps.
            metrics: of rank 0.
            clock: of the training, which does not count this.
            leave_out: because a checkpoint must not wait.
        """
        due = step % self._every == 0 or step == self._last_step
        if self._evaluator is None or not due or leave_out:
            return
        begun = time.perf_counter()
        with clock.paused(), _without_trace(self._engine.network, self._ranks):
            try:
                figures = self._evaluator.evaluate(
                    self._engine.forward,
                    lambda done, count: self._watchdog.at("evaluating", step, done - count),
                )
            except InputError as error:
                figures = {"online_failed": 1.0}
                self._warn(str(error))
        if metrics is not None:
            seconds = time.perf_counter() - begun
            metrics.write_online({"step": step, **figures, "online_seconds": seconds})

    def _warn(self, cause: str) -> None:
        if cause and not self._warned:
            log.warning(
                "rank %d: the evaluation while training failed; training goes on without it, and "
                "tries again every %d steps: %s",
                *(self._ranks.rank, self._every, cause),
            )
            self._warned = True


@contextmanager
def _without_trace(network: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Evaluation mode with rank 0's batch norm statistics, which are those of checkpoints.

    Afterwards modes, statistics and random numbers are what they were, bit for bit.
    """
    modes = [(module, module.training) for module in network.modules()]
    statistics = StatisticsKeeper((network,))
    with ExitStack() as stack:
        stack.callback(statistics.restore)
        devices = [ranks.device] if ranks.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        # not inference_mode: ZeRO 3 keeps some of the weights that it gathers, for training too
        stack.enter_context(torch.no_grad())
        if getattr(network.config, "compile", False):
            # other shapes and modes would be compiled anew, for minutes
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        network.eval()
        try:
            averages = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
            broadcast_values(averages, ranks)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
