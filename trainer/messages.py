"""What a run says at its beginning and its end; rank 0 only."""

import shlex

from data_pipeline.progress import clock
from trainer.checkpoint import newest_checkpoint
from trainer.config import RunConfig, TrainConfig
from trainer.distributed import Ranks
from trainer.preflight import Plan
from trainer.watchdog import say


def say_start(config: TrainConfig, plan: Plan, ranks: Ranks) -> None:
    """Where the run goes, and how much it is."""
    unnamed = str(plan.run) == RunConfig.directory
    hint = " (run.directory=FOLDER chooses another)" if unnamed else ""
    say(
        f"training in {plan.run}{hint}: {plan.total_steps:,} steps of {config.data.batch_size:,} "
        f"images, {ranks.world_size} rank{'s' * (ranks.world_size > 1)} on {ranks.device.type}, "
        f"{config.run.precision}"
    )


def say_end(config: TrainConfig, plan: Plan, step: int, seconds: float, reason: str) -> None:
    """How a run ended, where its result is, and what to do next.

    Args:
        config, plan: of the run.
        step: finished steps.
        seconds: of training, over all starts.
        reason: of an end before the last step.
    """
    newest = newest_checkpoint(plan.run)
    saved = "nothing was saved" if newest is None else f"saved in {newest.path}"
    if step < plan.total_steps:
        why = f" ({reason})" if reason else ""
        say(
            f"stopped at step {step:,} of {plan.total_steps:,}{why}, {saved}; the same command "
            "continues"
        )
        return
    say(f"done: {step:,} steps in {clock(seconds)}, {saved}")
    for when, command in zip(("next", "then"), next_commands(config, plan), strict=True):
        say(f"{when}: {command}")


def next_commands(config: TrainConfig, plan: Plan) -> tuple[str, str]:
    """From a finished run to a segmentation: classes for its pixels, and maps of photographs."""
    run, shards = str(plan.run), config.online.shards or config.data.shards
    manifest = plan.online or plan.manifest
    labelled = bool(manifest.classes) and all(
        shard.labels == shard.samples for shard in manifest.shards
    )
    if labelled:
        classes = ["maskbank", "evaluate", "kmeans", run, "--shards", shards, "--html"]
    else:
        classes = ["maskbank", "cluster", run, "--shards", shards]
    predict = shlex.join(["maskbank", "predict", run])
    return shlex.join(classes), f"{predict} PHOTOS --output FOLDER"
