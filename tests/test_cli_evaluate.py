"""`maskbank evaluate`: the commands on a tiny run, and what they say when something is wrong."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.manifest import Manifest, ShardEntry
from evaluation.cli import main
from tests.evaluation_data import scene_shards
from tests.forked import run_program
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import TrainConfig, load_config, save_config
from trainer.distributed import Ranks
from trainer.encoder import initial_network
from trainer.engine import network_state

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent
MODEL = ["model.decoder_channels=16", "model.embedding_dim=6", "model.atrous_rates=[1,2,3]"]
QUICK = ["--size", "40", "--precision", "float32", "--device", "cpu"]
KMEANS = [*QUICK, "--foreground", "probability", "--pca", "4", "--batch-size", "1"]
LINEAR = [*QUICK, "--no-augment", "--epochs", "2", "--decay-epoch", "1", "--batch-size", "4"]


@dataclass(frozen=True)
class Case:
    run: Path
    train: Path
    test: Path


def tiny_config(*settings: str) -> TrainConfig:
    return load_config("demo_cpu", None, [*MODEL, *settings])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run whose checkpoint is another network than the one before training."""
    folder = tmp_path_factory.mktemp("evaluate")
    case = Case(folder / "run", folder / "train", folder / "test")
    case.run.mkdir()
    save_config(tiny_config(), case.run / "config.yaml")
    network = initial_network(tiny_config("run.seed=5"))
    writer = CheckpointWriter(case.run, Ranks(0, 1, torch.device("cpu")), 1, 0)
    writer.start(12, network_state(network, "model"), {}, {"progress": {"step": 12}})
    while writer.step is not None:
        writer.wait()
        writer.advance(writer.busy, bool(writer.failure))
    scene_shards(case.train, 6, seed=1)
    scene_shards(case.test, 14, seed=2)
    return case


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`maskbank evaluate --nproc 2 …`."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [sys.executable, "-m", "evaluation.cli", *map(str, arguments)]
    return run_program([sys.executable, "-m", *launcher, *command])


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command in this process: exit status, what it printed, and its errors."""
    threads = torch.get_num_threads()

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, said.out, said.err

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def refusal(command: Command) -> Callable[..., str]:
    """What a command says on its way out with status 2."""

    def run(*arguments: object) -> str:
        status, out, error = command(*arguments)
        assert status == 2, error
        assert "Traceback" not in out + error
        return error

    return run


def read_result(run: Path, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "evaluation" / f"{name}.json").read_text())
    return value


def test_kmeans_and_report(case: Case, command: Command) -> None:
    arguments = ("kmeans", case.run, "--shards", case.test, *KMEANS, "--examples", 3)
    status, out, error = command(*arguments)
    assert status == 0, error
    result = read_result(case.run, "kmeans-trained")
    assert set(result) == {
        "protocol", "network", "step", "miou", "foreground_iou", "pixel_accuracy", "per_class",
        "confusion", "unmatched", "images", "seconds", "options", "data_set", "measure",
        "metrics", "published",
    }  # fmt: skip
    assert (result["protocol"], result["network"], result["step"]) == ("kmeans", "trained", 12)
    assert result["images"] == 14
    assert result["miou"]["mean"] == pytest.approx(np.mean(result["miou"]["values"]), abs=1e-4)
    assert len(result["miou"]["values"]) == 5
    present = [entry["iou"] for entry in result["per_class"] if entry["iou"] is not None]
    assert result["miou"]["values"][0] == pytest.approx(np.mean(present), abs=1e-3)
    names = [entry["class"] for entry in result["per_class"]]
    assert names[0] == "background"
    assert len(names) == 11
    confusion = np.array(result["confusion"])
    pixels = [entry["pixels"] for entry in result["per_class"]]
    assert (confusion.sum(1) + result["unmatched"]).tolist() == pixels
    assert result["options"]["size"] == 40
    assert result["options"]["prototype"]["foreground"] == "probability"
    # the table has every class, and the line below it the mean
    for name in names:
        assert name in out
    assert f"14 images: mIoU {result['miou']['mean']:.1f} ± " in out
    assert "kmeans-trained.json" in out
    with np.load(case.run / "evaluation" / "examples-trained.npz") as examples:
        assert examples["image"].shape == (3, 40, 40, 3)

    status, out, error = command("report", case.run)
    assert status == 0, error
    assert "report.html" in out
    page = (case.run / "report.html").read_text()
    assert f"{read_result(case.run, 'kmeans-trained')['miou']['mean']:.1f}" in page
    assert page.count('<img src="data:image/png') == 3 * 6


def test_linear_and_transfer(case: Case, command: Command) -> None:
    arguments = ("linear", case.run, "--train-shards", case.train, "--shards", case.test, *LINEAR)
    status, out, error = command(*arguments, "--seeds", 2, "--initial")
    assert status == 0, error
    result = read_result(case.run, "linear-initial")
    assert (result["protocol"], result["network"], result["step"]) == ("linear", "initial", 0)
    assert len(result["miou"]["values"]) == 2
    assert result["options"]["epochs"] == 2
    assert result["options"]["augment"] is False
    assert "linear classifier of the initial network at step 0, 14 images" in out

    head = case.run / "evaluation" / "linear-initial.safetensors"
    arguments = ("transfer", case.run, "--initial", "--shards", case.test, "--head", head)
    status, out, error = command(*arguments, "--precision", "float32", "--device", "cpu")
    assert status == 0, error
    again = read_result(case.run, "transfer-initial")
    assert again["options"]["size"] == 40, "that of the classifier"
    moved = np.abs(np.array(again["confusion"]) - result["confusion"]).sum()
    assert moved <= 0.01 * np.sum(result["confusion"]), "the same, but for features of 16 bits"


def test_finetune(case: Case, tmp_path: Path, command: Command) -> None:
    sets = ("--train-shards", case.train, "--shards", case.test, "--output", tmp_path)
    options = (*QUICK, "--epochs", 1, "--min-steps", 1, "--batch-size", 4)
    drawn = ("--fractions", "20", "--splits", 2)
    status, out, error = command("finetune", case.run, *sets, *options, *drawn)
    assert status == 0, error
    assert "fine-tuning on 20% of the labels of the trained network at step 12" in out
    result = read_result(tmp_path, "finetune-20-trained")
    assert result["options"]["learned_on"] == [1, 1]
    assert len(result["miou"]["values"]) == 2


def test_two_ranks_equal_one(
    case: Case, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as many threads a rank, since the last bit of what the network says depends on them
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    arguments = ("--shards", case.test, *KMEANS)
    alone, both = tmp_path / "alone", tmp_path / "both"
    for run in (alone, both):
        shutil.copytree(case.run / "checkpoints", run / "checkpoints")
        shutil.copy(case.run / "config.yaml", run)
    status, _, error = command("kmeans", alone, *arguments)
    assert status == 0, error
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    done = torchrun("kmeans", both, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mIoU") == 1, "one rank speaks"
    expected, result = (read_result(run, "kmeans-trained") for run in (alone, both))
    assert result | {"seconds": 0} == expected | {"seconds": 0}
    assert (both / "evaluation" / "examples-trained.npz").is_file()


def test_several_ranks_say_once_what_is_wrong(case: Case, tmp_path: Path) -> None:
    done = torchrun("kmeans", tmp_path, "--shards", case.test)
    assert done.returncode != 0
    assert done.stderr.count("is no run directory") == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--foreground", "box"], "--foreground is 'box'; it can be logit, probability or mask"),
        (["--pooling", "max"], "--pooling is 'max'; it can be weighted or normalized"),
        (["--method", "mean"], "--method is 'mean'; it can be minibatch or full"),
        (["--criterion", "area"], "--criterion is 'area'; it can be iou, count or image"),
        (["--unit", "class"], "--unit is 'class'; it can be image or pixel"),
        (["--precision", "fp8"], "--precision is 'fp8'; it can be float32 or bf16"),
        (["--device", "tpu"], "device is 'tpu'; it can be auto, cpu or cuda"),
        (["--clusters", "-2"], "--clusters and --pca must not be negative"),
        (["--seeds", "0"], "must be at least 1"),
        (["--size", "0"], "must be at least 1"),
    ],
)
def test_wrong_options_are_named(
    case: Case, refusal: Callable[..., str], option: list[str], said: str
) -> None:
    text = refusal("kmeans", case.run, "--shards", case.test, *option)
    assert text.startswith("maskbank: ")
    assert said in text


def test_unknown_options_and_missing_ones_are_refused(
    case: Case, refusal: Callable[..., str]
) -> None:
    assert "--cluster" in refusal("kmeans", case.run, "--shards", case.test, "--cluster=3")
    assert "--shards" in refusal("kmeans", case.run)
    assert "--train-shards" in refusal("linear", case.run, "--shards", case.test)
    assert "holds no classifier" in refusal("linear", case.run, "--own-classifier")


def test_no_run_and_no_checkpoint(case: Case, tmp_path: Path, refusal: Callable[..., str]) -> None:
    missing = refusal("kmeans", tmp_path / "none", "--shards", case.test)
    assert missing.startswith(f"maskbank: {tmp_path / 'none'} is no run directory")
    assert "not a run" in refusal("report", tmp_path / "none")
    save_config(tiny_config(), tmp_path / "config.yaml")
    empty = refusal("kmeans", tmp_path, "--shards", case.test)
    assert empty.startswith(f"maskbank: {tmp_path} has no complete checkpoint")


def test_checkpoint_of_another_architecture(
    case: Case, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    save_config(tiny_config("model.decoder_channels=8"), tmp_path / "config.yaml")
    shutil.copytree(case.run / "checkpoints", tmp_path / "checkpoints")
    text = refusal("linear", tmp_path, "--train-shards", case.train, "--shards", case.test, *LINEAR)
    assert text.startswith("maskbank: ")
    assert "of another architecture" in text


def test_shards_that_cannot_be_scored_on(
    case: Case, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    nothing = refusal("kmeans", case.run, "--shards", tmp_path)
    assert nothing.startswith(f"maskbank: {tmp_path} holds no manifest.json")
    shutil.copytree(case.test, tmp_path / "shards")
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    entries = tuple(ShardEntry(**(shard | {"labels": 0})) for shard in manifest["shards"])
    Manifest(tmp_path / "shards", entries, tuple(manifest["classes"]), 0, {}).write()
    unlabelled = refusal("kmeans", case.run, "--shards", tmp_path / "shards")
    assert unlabelled.startswith("maskbank: ")
    assert "14 of 14 samples have no label, which evaluation needs" in unlabelled


def test_a_damaged_shard_is_named(case: Case, tmp_path: Path, refusal: Callable[..., str]) -> None:
    shutil.copytree(case.test, tmp_path / "shards")
    tar = tmp_path / "shards" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 255
    tar.write_bytes(data)
    text = refusal("kmeans", case.run, "--shards", tmp_path / "shards", *KMEANS)
    said = next(line for line in text.splitlines() if line.startswith("maskbank: "))
    assert "shard-000000.tar:scene_" in said
    assert "the checksum differs" in said
