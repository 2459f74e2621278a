"""DeepSpeed's JSON, from our configuration and a user's file; contradictions name both sides."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from trainer.schedule import OptimConfig
from trainer.settings import EngineConfig

AUTO = "auto"  # "take ours", as in Hugging Face's files
_BUCKET = 50_000_000  # numbers that travel at a time
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
# What DeepSpeed could do as well, but is done here: the optimizer's state has to be readable for
# checkpoints of any engine, and the schedule goes by global steps.
_OURS = {
    "optimizer": "optim.name, optim.lr, optim.weight_decay",
    "scheduler": "optim.schedule",
    "data_efficiency": "data.*",
    "curriculum_learning": "data.*",
    "pipeline": "engine.name",
    "amp": "run.precision",
}


@dataclass(frozen=True)
class Given:
    """A value of our configuration, and the setting that it comes from."""

    value: Any
    setting: str


def deepspeed_settings(
    config: EngineConfig, optim: OptimConfig, batch_size: int, world_size: int, precision: str
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Args:
        config: of the engine; its file's settings are kept where they do not contradict.
        optim: for clipping and accumulation.
        batch_size: images a step, over all ranks and micro-batches.
        world_size: ranks.
        precision: of autocast.

    Raises:
        InputError: the file cannot be read, or says another thing than the configuration.
    """
    file = _read(config.deepspeed_config)
    where = config.deepspeed_config
    for key, setting in _OURS.items():
        if file.pop(key, AUTO) != AUTO:
            raise InputError(
                f"{where} has a section {key!r}, which maskbank does itself ({setting}); remove "
                "the section and use the setting"
            )
    for kind in ("bf16", "fp16"):
        _refuse_native_16_bits(file, kind, where)
    ours = dict(_our_values(config, optim, batch_size, world_size, precision, file))
    settings: dict[str, Any] = _without_auto(file)
    for path, given in ours.items():
        _put(settings, file, path, given, where)
    # torch's own optimizers are used, also on the host
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    settings.setdefault("steps_per_print", None)
    for kind in ("reduce", "allgather"):
        # it takes this memory whatever the network's size is: 2 GB by its own default
        settings["zero_optimization"].setdefault(f"{kind}_bucket_size", _BUCKET)
    return settings


def zero_stage(settings: dict[str, Any]) -> int:
    """The stage of finished settings."""
    return int(settings["zero_optimization"]["stage"])


def _our_values(
    config: EngineConfig,
    optim: OptimConfig,
    batch_size: int,
    world_size: int,
    precision: str,
    file: dict[str, Any],
) -> Iterator[tuple[str, Given]]:
    micro = batch_size // (world_size * optim.accumulate)
    even = batch_size % (world_size * optim.accumulate) == 0
    # DeepSpeed only measures throughput with these; uneven parts of a batch need no exact number
    yield "train_micro_batch_size_per_gpu", Given(max(1, micro), "data.batch_size")
    yield "gradient_accumulation_steps", Given(optim.accumulate, "optim.accumulate")
    yield "managed_gradient_accumulation", Given(True, "optim.accumulate")
    if even or file.get("train_batch_size", AUTO) != AUTO:
        yield "train_batch_size", Given(batch_size, "data.batch_size")
    yield "gradient_clipping", Given(float(optim.clip_norm), "optim.clip_norm")
    stage = config.zero_stage
    if stage is None:
        in_file = file.get("zero_optimization", {}).get("stage", AUTO)
        stage = 1 if in_file == AUTO else in_file
        if not isinstance(stage, int) or not 0 <= stage <= 3:
            raise InputError(
                f"{config.deepspeed_config}: zero_optimization.stage is {stage!r}; it can be 0 to 3"
            )
    yield "zero_optimization.stage", Given(stage, "engine.zero_stage")
    if config.offload_optimizer:
        if stage == 0:
            raise InputError(
                "engine.offload_optimizer needs ZeRO 1, 2 or 3, and the stage is 0; set "
                "engine.zero_stage=1"
            )
        yield (
            "zero_optimization.offload_optimizer.device",
            Given("cpu", "engine.offload_optimizer"),
        )
    yield "torch_autocast.enabled", Given(precision in _DTYPES, "run.precision")
    if precision in _DTYPES:
        yield "torch_autocast.dtype", Given(_DTYPES[precision], "run.precision")


def _read(name: str) -> dict[str, Any]:
    if not name:
        return {}
    try:
        value = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"engine.deepspeed_config {name}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"engine.deepspeed_config {name} is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"engine.deepspeed_config {name} must be an object with named settings")
    for key in ("zero_optimization", "torch_autocast", "bf16", "fp16"):
        if not isinstance(value.get(key, {}), dict):
            raise InputError(f"engine.deepspeed_config {name}: {key} must be an object")
    return value


def _refuse_native_16_bits(file: dict[str, Any], kind: str, where: str) -> None:
    if file.pop(kind, {}).get("enabled", False) not in (False, AUTO):
        raise InputError(
            f"{where} enables {kind}, which keeps weights in 16 bits; the momentum encoder moves "
            "by a thousandth of the way at a step, which 16 bits cannot hold. Remove the section "
            f"and set run.precision={kind}: weights stay in float32, the networks run in 16 bits"
        )


def _put(
    settings: dict[str, Any], file: dict[str, Any], path: str, given: Given, where: str
) -> None:
    """Sets `a.b.c`, unless the file has another value there."""
    *parents, last = path.split(".")
    theirs: Any = file
    for parent in (*parents, last):
        theirs = theirs.get(parent, AUTO) if isinstance(theirs, dict) else AUTO
    if theirs != AUTO and theirs != given.value:
        raise InputError(
            f"{where} says {path} = {theirs!r}, and {given.setting} of the run makes it "
            f'{given.value!r}; change one of them, or write "auto" in the file to take the run\'s'
        )
    for parent in parents:
        settings = settings.setdefault(parent, {})
    settings[last] = given.value


def _without_auto(value: Any) -> Any:
    """The file without what it leaves to us or to DeepSpeed's defaults."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != AUTO}
