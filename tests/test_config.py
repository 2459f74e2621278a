"""Configuration: published values, clear errors, nothing that is read by no one."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from trainer.config import (
    TrainConfig,
    load_config,
    recipe_names,
    resume_difference,
    save_config,
)
from trainer.precision import settle_precision

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("recipe", "batch", "capacity", "freeze", "start"),
    [
        ("voc_supervised_saliency", 64, 128, ("conv1", "bn1", "layer1", "layer2"), "imagenet"),
        ("voc_unsupervised_saliency", 128, 256, (), "moco_v2.pth.tar"),
    ],
)
def test_recipes_hold_the_papers_values(
    recipe: str, batch: int, capacity: int, freeze: tuple[str, ...], start: str
) -> None:
    config = load_config(recipe, None, [] if start == "imagenet" else [f"model.start={start}"])
    assert (config.data.batch_size, config.bank.capacity) == (batch, capacity)
    assert (config.model.freeze, config.model.start) == (freeze, start)
    assert (config.run.epochs, config.run.steps, config.run.precision) == (40, 0, "float32")
    assert (config.model.backbone, config.model.embedding_dim) == ("resnet50", 32)
    assert (config.model.atrous_rates, config.model.decoder_channels) == ((12, 24, 36), 256)
    assert (config.model.dropout, config.model.momentum) == (0.5, 0.999)
    assert config.model.batch_norm == "shuffle"
    assert config.loss.temperature == 0.5
    optim = config.optim
    assert (optim.lr, optim.momentum, optim.weight_decay) == (0.004, 0.9, 1e-4)
    assert (optim.schedule, optim.per, optim.power) == ("poly", "epoch", 0.9)
    views = config.views
    assert (views.image_size, views.min_scale, views.max_scale) == (224, 0.2, 1.0)
    assert (views.brightness, views.contrast, views.saturation, views.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (views.jitter_probability, views.grayscale_probability) == (0.8, 0.2)
    assert (views.flip_probability, views.min_coverage, views.max_coverage) == (0.5, 0.01, 0.99)


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_saved_configuration_is_the_same_configuration(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe, None, ["run.seed=7", "data.shards=a b", "model.start=random"])
    assert config.model.start == "random"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(file=tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [("voc_unsupervised_saliency", "MoCo v2's checkpoint"), ("voc_vit_small", "DINO's weights")],
)
def test_a_recipe_that_needs_weights_does_not_train_without_a_word_about_them(
    recipe: str, weights: str, tmp_path: Path
) -> None:
    message = f"recipe {recipe} needs model.start; give model.start=FILE, {weights}.*start=random"
    with pytest.raises(InputError, match=message):
        load_config(recipe)
    file = tmp_path / "mine.yaml"
    file.write_text("optim:\n  lr: 0.1\n")
    with pytest.raises(InputError, match=message):
        load_config(recipe, file)
    file.write_text("model:\n  start: weights.pth\n")
    assert load_config(recipe, file).model.start == "weights.pth"
    file.write_text("data:\n  shards: ???\n")  # a user's own file may leave settings open too
    with pytest.raises(InputError, match=r"mine\.yaml needs data\.shards; give data"):
        load_config("demo_cpu", file)
    assert load_config("demo_cpu", file, ["data.shards=s"]).data.shards == "s"


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.5, momentum: 0.8}\n")
    config = load_config("demo_cpu", file, ["optim.lr=0.25"])
    assert (config.optim.lr, config.optim.momentum) == (0.25, 0.8)
    assert config.model.backbone == "small"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.lrate=1"], r"no setting 'optim.lrate'; did you mean optim.lr"),
        (["lr=1"], r"no setting 'lr'.*optim.lr"),
        (["zebra.x=1"], r"no setting 'zebra.x'; .*bank, data"),
        (["optim.lr=fast"], r"setting optim.lr: .*'fast'"),
        (["run.steps=1.5"], r"setting run.steps"),
        (["run.tensorboard=perhaps"], r"setting run.tensorboard"),
        (["model.freeze=[stem9]"], r"model.freeze names 'stem9'; resnet50 has the stages conv1"),
        (["model.backbone=vgg"], r"model.backbone is 'vgg'; it can be small, resnet18"),
        (["model.batch_norm=group"], r"model.batch_norm is 'group'"),
        (["optim.lr=0"], r"optim.lr must be above 0"),
        (["loss.temperature=0"], r"loss.temperature is 0"),
        (["bank.capacity=-1"], r"bank.capacity is -1"),
        (["bank.chunk_size=0"], r"bank.chunk_size is 0; it must be at least 1"),
        (["bank.dtype=fp8"], r"bank.dtype is 'fp8'; it can be auto, float32, float16, bfloat16"),
        (["bank.move=queries"], r"bank.move is 'queries'; it can be auto, bank or pixels"),
        (["loss.pixels_per_mask=-1"], r"loss.pixels_per_mask is -1"),
        (["run.precision=fp8"], r"run.precision is 'fp8'; it can be auto, bf16, fp16 or float32"),
        (["engine.name=fsdp"], r"engine.name is 'fsdp'; it can be ddp or deepspeed"),
        (["engine.zero_stage=2"], r"engine.zero_stage is DeepSpeed's; set engine.name=deepspeed"),
        (["engine.name=deepspeed", "engine.zero_stage=4"], r"engine.zero_stage is 4"),
        (["optim.name=lamb"], r"optim.name is 'lamb'; it can be sgd or adamw"),
        (["optim.beta2=1"], r"optim.beta2 is 1"),
        (["run.keep_every=-1"], r"run.keep_every.* must not be negative"),
        (["run.start_timeout_seconds=0"], r"run.start_timeout_seconds must be above 0"),
        (["data.loader=ffcv"], r"data.loader is 'ffcv'"),
        (["verbose"], r"'verbose' is no setting; write key=value"),
        (["run=3"], r"run"),
    ],
)
def test_wrong_settings_are_named(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(None, None, settings)


def test_unknown_recipe_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe 'voc'; the recipes are demo_cpu"):
        load_config("voc")
    with pytest.raises(InputError, match=r"none.yaml cannot be read"):
        load_config(file=tmp_path / "none.yaml")
    for number, text in enumerate(("a: [1", "- 1\n- 2", "run: !!python/object:os.system x")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        with pytest.raises(InputError, match=f"{number}.yaml"):
            load_config(file=file)


def test_only_what_changes_the_result_keeps_a_run_from_going_on() -> None:
    before = load_config("demo_cpu")
    faster = load_config(
        "demo_cpu",
        None,
        ["run.log_every=1", "data.loader=torch", "run.threads=3", "bank.move=pixels"],
    )
    assert resume_difference(before, faster) == ""
    changed = load_config("demo_cpu", None, ["optim.lr=0.01"])
    assert "optim.lr was" in resume_difference(before, changed)


def test_every_setting_is_read_somewhere() -> None:
    """A setting that nothing reads is a lie to its user."""
    read: set[str] = set()
    files = [file for name in ("trainer", "data_pipeline") for file in (ROOT / name).rglob("*.py")]
    for file in (*files, ROOT / "evaluation/online.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and not _is_self_check(node):
                read.add(node.attr)
    for section in fields(TrainConfig):
        for setting in fields(section.default_factory):  # type: ignore[arg-type]
            assert setting.name in read, f"{section.name}.{setting.name} is read by nothing"


def test_every_setting_is_described() -> None:
    for section in fields(TrainConfig):
        described = section.default_factory.__doc__ or ""  # type: ignore[union-attr]
        for setting in fields(section.default_factory):  # type: ignore[arg-type]
            assert re.search(rf"\b{setting.name}\b", described), f"{section.name}.{setting.name}"


def _is_self_check(node: ast.Attribute) -> bool:
    """`self.x` in the class's own check is no use of the setting."""
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def test_precision_is_settled_once_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("demo_cpu", None, [f"run.directory={tmp_path}", "run.device=cpu"])
    assert config.run.precision == "auto"
    for units, expected in (({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "float32")):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda units=units: units, raising=False)
        assert settle_precision(config).run.precision == expected
    # the run goes to a machine with other units
    save_config(settle_precision(config), tmp_path / "config.yaml")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    continued = settle_precision(config)
    assert continued.run.precision == "float32"
    assert resume_difference(load_config(file=tmp_path / "config.yaml"), continued) == ""
    given = load_config("demo_cpu", None, ["run.precision=fp16"])
    assert settle_precision(given) is given
