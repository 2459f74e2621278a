"""Everything that can be known to be wrong before a rank starts to train.

`python -m trainer.preflight --world-size N …` takes the arguments of `trainer.train` and exits 2
with one paragraph; `maskbank train` runs it first, and every rank checks again.
"""

import argparse
import hashlib
import logging
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # torch takes seconds to load: a Ctrl-C then needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch

from data_pipeline.errors import InputError
from data_pipeline.files import require_writable
from data_pipeline.index import DatasetIndex
from data_pipeline.labelled import labelled_shards
from data_pipeline.manifest import (
    Manifest,
    missing_shards,
    read_manifest,
    require_a_shard,
    require_component,
)
from trainer.checkpoint import complete_checkpoints
from trainer.config import TrainConfig, add_arguments, load_config, resume_difference
from trainer.encoder import initial_network, read_run_config
from trainer.precision import settle_precision

_LOOKED_AT = 1000  # samples, for an object


@dataclass(frozen=True)
class Plan:
    """A run that may start.

    Attributes:
        manifest: of the training shards.
        total_steps: optimizer steps.
        steps_per_epoch: need not be whole; batches run on over the end of an epoch.
        run: run directory.
        begun: whether it holds a checkpoint to go on from.
        data_fingerprint: of the shards' contents.
        warnings: what may go on, but should be known.
        online: labelled shards to evaluate on while training, if any.
    """

    manifest: Manifest
    total_steps: int
    steps_per_epoch: float
    run: Path
    begun: bool
    data_fingerprint: str
    warnings: tuple[str, ...] = ()
    online: Manifest | None = None


def plan_run(config: TrainConfig, world_size: int, rank: int = 0) -> Plan:
    """Checks the configuration against data, ranks and run directory.

    Only rank 0, which says it, counts the shards that are missing: with all ranks of a large run
    looking for thousands of files, a file server would be busy for minutes.

    Raises:
        InputError: what is wrong, where, and the remedy.
    """
    if not config.data.shards:
        raise InputError(
            "data.shards is not set; add data.shards=FOLDER (made by `maskbank shards build`)"
        )
    cache = Path(config.data.cache) if config.data.cache else None
    manifest = read_manifest(config.data.shards, False, cache, config.data.cache_gib)
    require_component(manifest, "mask", "training")
    _require_an_object(manifest)
    _check_batch(config, world_size)
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise InputError("run.device is cuda, but torch sees no GPU here; set it to cpu or auto")
    steps_per_epoch = manifest.samples / config.data.batch_size
    total_steps = config.run.steps or int(config.run.epochs * steps_per_epoch)
    if total_steps < 1:
        raise InputError(
            f"run.epochs {config.run.epochs} of {manifest.samples} samples are less than one batch "
            f"of {config.data.batch_size}; raise run.epochs, or set run.steps"
        )
    run = Path(config.run.directory)
    contents = (  # what is in quarantine changes the order of all samples
        shard.sha256 + (shard.index_sha256 if shard.quarantined else "")
        for shard in manifest.shards
    )
    digest = hashlib.sha256("".join(contents).encode())
    plan = Plan(
        manifest,
        total_steps,
        steps_per_epoch,
        run,
        bool(complete_checkpoints(run)),
        digest.hexdigest(),
        tuple(_warnings(config, manifest, rank)),
        _online_shards(config),
    )
    _check_run_directory(run, config, plan)
    return plan


def _require_an_object(manifest: Manifest) -> None:
    """Raises InputError where no mask has an object: every loss would be 0.

    Reads the records of some samples, evenly spread, up to the first with an object. Shards at an
    address are not downloaded for that.
    """
    if manifest.cache is not None:
        return
    index = DatasetIndex(manifest)
    numbers = np.unique(np.linspace(0, manifest.samples - 1, _LOOKED_AT).astype(np.int64))
    for number in numbers.tolist():
        try:
            if index.record(*index.locate(number)).proposals:
                return
        except InputError:
            return  # training replaces what cannot be read, and says so
    raise InputError(
        f"{manifest}: the masks of all {len(numbers):,} samples that were looked at are empty, and "
        "training learns from objects alone; make other masks (`maskbank masks make`) and build "
        "the shards again"
    )


def _online_shards(config: TrainConfig) -> Manifest | None:
    """What the evaluation while training reads: all of it must be there, unlike training shards."""
    if not config.online.shards:
        return None
    try:
        cache = Path(config.data.cache) if config.data.cache else None
        manifest = read_manifest(config.online.shards, True, cache, config.data.cache_gib)
        labelled_shards(manifest)
        if config.online.foreground == "mask":
            require_component(manifest, "mask", "online.foreground=mask")
    except InputError as error:
        raise InputError(f"online.shards: {error}") from None
    return manifest


def _warnings(config: TrainConfig, manifest: Manifest, rank: int) -> Iterator[str]:
    if rank:
        require_a_shard(manifest)
    elif missing := missing_shards(manifest):
        yield missing
    bank, samples = config.bank, manifest.samples
    if bank.capacity >= samples / 2 and not bank.mask_same_image:
        yield (
            f"bank.capacity {bank.capacity} nears the data set's size, {samples} samples: on "
            f"average {bank.capacity / samples:.1f} entries or more of the bank come from a "
            "pixel's own image, and it is pushed away from its own object; set "
            f"bank.mask_same_image=true, or bank.capacity below {max(1, samples // 2)}"
        )


def _check_run_directory(run: Path, config: TrainConfig, plan: Plan) -> None:
    require_writable(run, "run.directory")
    run.mkdir(parents=True, exist_ok=True)
    if not plan.begun:
        return
    if difference := resume_difference(read_run_config(run), config):
        raise InputError(
            f"{run} holds a run with other settings: {difference}. Set it back to go on with that "
            "run, or choose another run.directory"
        )
    for checkpoint in reversed(complete_checkpoints(run)):
        try:
            progress = checkpoint.describe()["progress"]
        except InputError:
            continue  # passed over, and said, when the run goes on
        if progress.get("data") != plan.data_fingerprint:
            raise InputError(
                f"{run} was trained on other shards than {config.data.shards}; give data.shards "
                "the former ones to go on with that run, or choose another run.directory"
            )
        return


def _check_batch(config: TrainConfig, world_size: int) -> None:
    size, micro_batches = config.data.batch_size, config.optim.accumulate
    if size % micro_batches:
        raise InputError(
            f"data.batch_size {size} is not divisible by optim.accumulate {micro_batches}; set it "
            f"to a multiple of {micro_batches}"
        )
    local = size // micro_batches // world_size  # of the rank that has the fewest
    if local == 0:
        raise InputError(
            f"data.batch_size {size} in {micro_batches} micro-batches gives {world_size} ranks "
            f"less than one image each; raise it to {world_size * micro_batches} or more, or start "
            "fewer ranks"
        )
    if local == 1 and config.model.batch_norm in ("plain", "shuffle"):
        raise InputError(
            "a rank's micro-batch is one image, of which batch norm over the pooled branch has "
            "no variance; raise data.batch_size, or set model.batch_norm=sync or frozen"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="maskbank train", description=__doc__)
    parser.add_argument("--world-size", type=int, default=1)
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        given = load_config(options.recipe, options.config, options.settings)
        config = settle_precision(given)
        plan = plan_run(config, options.world_size)
        if not plan.begun:
            initial_network(config)
    except InputError as error:
        print(f"maskbank: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
