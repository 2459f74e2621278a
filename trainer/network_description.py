"""What an exported network says about itself, in the metadata of its safetensors file."""

import json
from dataclasses import MISSING, asdict, fields, replace
from typing import Any

from data_pipeline.errors import InputError
from trainer.settings import ModelConfig

KEY = "maskbank"
_VERSION = 1
_MOST_BYTES = 1 << 16
_LARGEST_RATE = 1024  # features; a larger one would only pad
_REMEDY = "export the network again, or ask who made the file"


def describe_network(config: ModelConfig, step: int) -> dict[str, str]:
    """The metadata: version, every setting of the network, steps that it was trained for.

    Of the start only stays whether it was ImageNet's, which says how images are normalised; the
    rest may be a path.
    """
    start = config.start if config.start == "imagenet" else "random"
    model = asdict(replace(config, start=start))
    text = json.dumps({"version": _VERSION, "model": model, "step": step}, sort_keys=True)
    return {"format": "pt", KEY: text}


def parse_description(metadata: dict[str, str], origin: str) -> tuple[ModelConfig, int] | None:
    """Settings and steps from a file's metadata, which may be a stranger's; None without them.

    Raises:
        InputError: they are not what `describe_network` writes.
    """
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has {len(text)} bytes")
        value = json.loads(text)
        if not isinstance(value, dict) or value.get("version") != _VERSION:
            raise ValueError(f"it is not of version {_VERSION}, which this maskbank reads")
        step = value.get("step")
        if type(step) is not int or not 0 <= step < 2**63:
            raise ValueError(f"step is {_short(step)}")
        return _model(value.get("model")), step
    except (ValueError, RecursionError) as error:  # InputError too: a value is out of range
        raise InputError(f"{origin}: its description is wrong ({error}); {_REMEDY}") from None


def _model(value: Any) -> ModelConfig:
    if not isinstance(value, dict):
        raise ValueError("it has no settings of the model")
    known = {field.name: field.default for field in fields(ModelConfig)}
    assert MISSING not in known.values()
    settings: dict[str, Any] = {}
    for name, given in value.items():
        if name not in known:
            raise ValueError(f"model.{_short(name)} is no setting of this maskbank")
        settings[name] = _checked(name, given, known[name])
    config = ModelConfig(**settings)
    if not all(1 <= rate <= _LARGEST_RATE for rate in config.atrous_rates):
        raise ValueError(f"model.atrous_rates are not in 1…{_LARGEST_RATE}")
    return config


def _checked(name: str, given: Any, default: Any) -> Any:
    """`given`, which must be of the type of `default`."""
    if isinstance(default, tuple):
        kind = int if name == "atrous_rates" else str
        right = isinstance(given, list) and all(type(one) is kind for one in given)
        if right and (kind is str or len(given) == len(default)):
            return tuple(given)
    elif type(given) is type(default) or (type(default) is float and type(given) is int):
        return given
    raise ValueError(f"model.{name} is {_short(given)}")


def _short(value: Any) -> str:
    return repr(value)[:80]
