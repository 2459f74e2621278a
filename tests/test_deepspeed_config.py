"""DeepSpeed's JSON: ours where it is silent, an error where it says another thing."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError
from trainer.deepspeed_config import deepspeed_settings, zero_stage
from trainer.engine import EngineConfig
from trainer.schedule import OptimConfig

OPTIM = OptimConfig(clip_norm=2.0, accumulate=2)
BUCKETS = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}


def made(file: Path | None = None, precision: str = "bf16", **config: Any) -> dict[str, Any]:
    name = str(file) if file is not None else ""
    engine = EngineConfig("deepspeed", deepspeed_config=name, **config)
    return deepspeed_settings(engine, OPTIM, 48, 4, precision)


def written(tmp_path: Path, value: Any) -> Path:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(value))
    return file


def test_without_a_file_everything_comes_from_the_run() -> None:
    settings = made()
    assert settings["train_batch_size"] == 48
    assert settings["train_micro_batch_size_per_gpu"] == 6
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 2.0
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert zero_stage(settings) == 1
    assert made(precision="float32")["torch_autocast"] == {"enabled": False}
    offloaded = made(zero_stage=2, offload_optimizer=True)["zero_optimization"]
    assert offloaded == {"stage": 2, "offload_optimizer": {"device": "cpu"}, **BUCKETS}


def test_auto_and_what_is_equal_is_taken_and_the_rest_is_kept(tmp_path: Path) -> None:
    file = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 6,
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": "auto",
        "wall_clock_breakdown": True,
    }
    settings = made(written(tmp_path, file))
    assert settings["train_batch_size"] == 48
    assert settings["zero_optimization"] == {"stage": 3, "overlap_comm": True, **BUCKETS}
    assert settings["wall_clock_breakdown"] is True
    assert "bf16" not in settings
    assert '"auto"' not in json.dumps(settings)


@pytest.mark.parametrize(
    ("file", "sides"),
    [
        ({"train_batch_size": 64}, ("train_batch_size = 64", "data.batch_size", "48")),
        ({"train_micro_batch_size_per_gpu": 8}, ("per_gpu = 8", "data.batch_size", "6")),
        ({"gradient_accumulation_steps": 1}, ("steps = 1", "optim.accumulate", "2")),
        ({"managed_gradient_accumulation": False}, ("= False", "optim.accumulate", "True")),
        ({"gradient_clipping": 1.0}, ("clipping = 1.0", "optim.clip_norm", "2.0")),
        ({"zero_optimization": {"stage": 3}}, ("stage = 3", "engine.zero_stage", "2")),
        ({"torch_autocast": {"dtype": "float16"}}, ("'float16'", "run.precision", "'bfloat16'")),
    ],
)
def test_contradictions_name_both_sides(
    tmp_path: Path, file: dict[str, Any], sides: tuple[str, ...]
) -> None:
    path = written(tmp_path, file)
    with pytest.raises(InputError) as caught:
        made(path, zero_stage=2)
    for side in (str(path), *sides):
        assert side in str(caught.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "'optimizer', which maskbank does itself"),
        ({"scheduler": {}}, "'scheduler', which maskbank does itself"),
        ({"bf16": {"enabled": True}}, "set run.precision=bf16"),
        ({"fp16": {"enabled": True}}, "set run.precision=fp16"),
        ({"fp16": True}, "fp16 must be an object"),
        ({"zero_optimization": {"stage": 7}}, "stage is 7; it can be 0 to 3"),
        ([1], "must be an object"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, file: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(written(tmp_path, file))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.json: No such file"):
        made(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{'a': 1}")
    with pytest.raises(InputError, match=r"bad.json is no JSON"):
        made(tmp_path / "bad.json")


def test_uneven_parts_leave_the_sum_to_us() -> None:
    engine = EngineConfig("deepspeed")
    settings = deepspeed_settings(engine, OptimConfig(), 10, 4, "float32")
    assert "train_batch_size" not in settings
    assert settings["train_micro_batch_size_per_gpu"] == 2


def test_offloading_needs_something_to_offload() -> None:
    with pytest.raises(InputError, match="needs ZeRO 1, 2 or 3"):
        made(zero_stage=0, offload_optimizer=True)
