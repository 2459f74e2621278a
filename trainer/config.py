"""The configuration: frozen dataclasses that check themselves, merged by OmegaConf."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.errors import InputError
from data_pipeline.views import ViewConfig
from trainer.schedule import OptimConfig
from trainer.settings import (
    PRECISIONS,
    BankConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    OnlineConfig,
)


@dataclass(frozen=True)
class DataConfig:
    """Where batches come from.

    Attributes:
        shards: folder of the training shards, or their address, as s3://bucket/shards.
        batch_size: images a step over all ranks and micro-batches.
        loader: auto (DALI on a GPU where it is installed, else torch), dali, or torch.
        threads: a rank, for reading and for decoding; 0 takes the rank's share of the cores.
        prefetch: batches kept ready.
        window: shards whose samples are mixed.
        cache: folder for shards at an address; empty takes ~/.cache/maskbank.
        cache_gib: what the cache may grow to, about.
    """

    shards: str = ""
    batch_size: int = 64
    loader: str = "auto"
    threads: int = 0
    prefetch: int = 2
    window: int = 8
    cache: str = ""
    cache_gib: float = 100.0

    def __post_init__(self) -> None:
        if self.loader not in ("auto", "dali", "torch"):
            raise InputError(f"data.loader is {self.loader!r}; it can be auto, dali or torch")
        if min(self.batch_size, self.prefetch, self.window) < 1 or self.threads < 0:
            raise InputError(
                "data.batch_size, data.prefetch and data.window must be at least 1, "
                "data.threads not negative"
            )


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
        directory: of the run: configuration, metrics, checkpoints; training goes on where it is.
        epochs: how long; used when steps is 0.
        steps: how long, in optimizer steps.
        seed: of initial weights, order, augmentation and dropout.
        device: auto, cpu or cuda.
        precision: bf16 or fp16 (autocast; fp16 with a loss scale), float32, or auto: bf16 where the
            device multiplies it in hardware, else float32.
        threads: of torch a rank on a CPU; 0 takes the rank's share of the cores.
        log_every, checkpoint_every: steps.
        keep_checkpoints: newest ones that stay.
        keep_every: those of every so many steps stay too; 0 keeps none of them.
        timeout_seconds: a rank that is silent or does not come on for so long ends the run.
        start_timeout_seconds: the same until the first step is done, which may compile.
        max_skipped: so many steps in a row whose loss or gradient is no number end the run; 0
            never does.
        max_fruitless_restarts: automatic restarts without a step gained, until no more are tried;
            0 tries for ever.
        tensorboard: whether to write its files too.
    """

    directory: str = "runs/default"
    epochs: float = 40.0
    steps: int = 0
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int = 0
    timeout_seconds: float = 600.0
    start_timeout_seconds: float = 1800.0
    max_skipped: int = 20
    max_fruitless_restarts: int = 3
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"run.device is {self.device!r}; it can be auto, cpu or cuda")
        if self.precision not in ("auto", *PRECISIONS):
            raise InputError(
                f"run.precision is {self.precision!r}; it can be auto, bf16, fp16 or float32"
            )
        if min(self.log_every, self.checkpoint_every, self.keep_checkpoints) < 1:
            raise InputError(
                "run.log_every, run.checkpoint_every, run.keep_checkpoints must be at least 1"
            )
        if self.steps < 0 or self.epochs <= 0 or self.seed < 0 or self.threads < 0:
            raise InputError(
                "run.steps, run.seed and run.threads must not be negative, run.epochs above 0"
            )
        if min(self.timeout_seconds, self.start_timeout_seconds) <= 0:
            raise InputError("run.timeout_seconds and run.start_timeout_seconds must be above 0")
        if min(self.keep_every, self.max_skipped, self.max_fruitless_restarts) < 0:
            raise InputError(
                "run.keep_every, run.max_skipped, run.max_fruitless_restarts must not be negative"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)


_RECIPES = Path(__file__).with_name("recipes")
_TO_BE_GIVEN = "???"  # begins a value that has to be given; what follows says what is meant

# What may change when a run goes on: where things are and how fast, never what is computed.
_FREE_ON_RESUME = {
    "run.directory",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.keep_every",
    "run.timeout_seconds",
    "run.start_timeout_seconds",
    "run.max_skipped",
    "run.max_fruitless_restarts",
    "run.tensorboard",
    "run.threads",
    "run.device",
    "data.shards",
    "data.cache",
    "data.cache_gib",
    "data.loader",
    "data.threads",
    "data.prefetch",
    "bank.move",
    "bank.chunk_size",
    "model.checkpoint_activations",
    "model.compile",
    "engine.name",
    "engine.zero_stage",
    "engine.offload_optimizer",
    "engine.deepspeed_config",
    *(f"online.{setting.name}" for setting in fields(OnlineConfig)),
}


def recipe_names() -> list[str]:
    """Names of the recipes that come with maskbank."""
    return sorted(file.stem for file in _RECIPES.glob("*.yaml"))


def load_config(
    recipe: str | None = None, file: Path | None = None, overrides: Sequence[str] = ()
) -> TrainConfig:
    """Merges a recipe, a YAML file and `key=value` arguments, later ones winning.

    Raises:
        InputError: an unknown recipe or key, a wrong type, a value out of range, or one that a
            recipe leaves to its user: a text of `???` and what to give.
    """
    layers = _recipe_layer(recipe)
    if file is not None:
        layers.append((str(file), _read_yaml(file)))
    return _build([*layers, *_argument_layers(overrides)])


def check_settings(recipe: str | None, overrides: Sequence[str]) -> None:
    """Checks a recipe's name, and keys and types of arguments that a file unknown here completes.

    Raises:
        InputError: an unknown recipe or key, or a wrong type.
    """
    known = _flatten(TrainConfig())
    merged: Any = OmegaConf.create({})
    for where, layer in [*_recipe_layer(recipe), *_argument_layers(overrides)]:
        _known_leaves(where, layer, known)
        merged = OmegaConf.merge(merged, layer)
    for section in fields(TrainConfig):
        _typed(section.name, section.default_factory, merged)


def _recipe_layer(recipe: str | None) -> list[tuple[str, Any]]:
    if recipe is None:
        return []
    if recipe not in recipe_names():
        raise InputError(
            f"there is no recipe {recipe!r}; the recipes are {', '.join(recipe_names())}"
        )
    return [(f"recipe {recipe}", _read_yaml(_RECIPES / f"{recipe}.yaml"))]


def _argument_layers(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    layers = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{override!r} is no setting; write key=value, as in run.steps=1000")
        layers.append((f"argument {override!r}", OmegaConf.from_dotlist([override])))
    return layers


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML, which starts the same run again."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which run is meant."""
    parser.add_argument("--recipe", metavar="NAME", help="a recipe that comes with maskbank")
    parser.add_argument("--config", metavar="FILE", type=Path, help="a YAML file over the recipe")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="over both")


def resume_difference(old: TrainConfig, new: TrainConfig) -> str:
    """The first setting whose change would change the result of a run that goes on, or ''."""
    before, after = _flatten(old), _flatten(new)
    for key, value in after.items():
        if key not in _FREE_ON_RESUME and before[key] != value:
            return f"{key} was {before[key]!r} and is now {value!r}"
    return ""


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            values |= _flatten(value, f"{prefix}{entry.name}.")
        else:
            values[prefix + entry.name] = value
    return values


def _read_yaml(file: Path) -> DictConfig:
    try:
        value = OmegaConf.load(file)
    except OSError as error:
        raise InputError(f"configuration {file} cannot be read ({error.strerror})") from None
    except Exception as error:  # yaml's errors have no common base that OmegaConf documents
        raise InputError(f"configuration {file} is no YAML: {str(error)[:300]}") from None
    if not isinstance(value, DictConfig):
        raise InputError(f"configuration {file} must be a mapping of sections, such as `run:`")
    return value


def _build(layers: Sequence[tuple[str, Any]]) -> TrainConfig:
    known = _flatten(TrainConfig())
    merged: Any = OmegaConf.create({})
    to_be_given: dict[str, str] = {}
    for where, layer in layers:
        for key, value in _known_leaves(where, layer, known):
            to_be_given.pop(key, None)
            if str(value).startswith(_TO_BE_GIVEN):
                what = str(value).removeprefix(_TO_BE_GIVEN).strip()
                to_be_given[key] = f"{where} needs {key}; {_remedy(key, what)}"
        merged = OmegaConf.merge(merged, layer)
    for message in to_be_given.values():
        raise InputError(message)
    sections: dict[str, Any] = {}
    for section in fields(TrainConfig):
        kind: Any = section.default_factory
        sections[section.name] = _freeze(kind, _typed(section.name, kind, merged))
    return TrainConfig(**sections)


def _known_leaves(where: str, layer: Any, known: dict[str, Any]) -> list[tuple[str, Any]]:
    """Keys and values of a layer, all of them settings that there are."""
    leaves = _leaves(OmegaConf.to_container(layer, resolve=False))
    for key, _ in leaves:
        if key not in known:
            raise InputError(f"{where}: there is no setting {key!r}; {_neighbours(key, known)}")
    return leaves


def _typed(name: str, kind: Any, merged: Any) -> Any:
    """The values of a section, of the types that it declares."""
    schema = OmegaConf.structured(kind)
    OmegaConf.set_readonly(schema, False)
    given = merged.get(name)
    try:
        value = OmegaConf.merge(schema, {} if given is None else given)
        return OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise InputError(f"setting {name}.{key}: {str(error).splitlines()[0]}") from None


def _remedy(key: str, what: str) -> str:
    """What to give for a setting that a recipe leaves open."""
    if key != "model.start":
        return f"give {key}={what or 'VALUE'}"
    return (
        f"give model.start=FILE, {what or 'the weights to start from'}; with model.start=random it "
        "trains from random weights, which is another experiment"
    )


def _freeze(kind: Any, values: Any) -> Any:
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix[:-1], value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{prefix}{key}.")]


def _neighbours(key: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    last = key.rpartition(".")[2]
    close += [name for name in known if name.endswith(f".{last}") and name not in close]
    if close:
        return f"did you mean {', '.join(close[:3])}?"
    section = key.partition(".")[0]
    inside = [name for name in known if name.startswith(f"{section}.")]
    return f"settings there: {', '.join(inside or sorted({n.partition('.')[0] for n in known}))}"
