"""Training runs as users start them: torchrun, killed and started again, on other ranks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.build_config import BuildConfig
from data_pipeline.errors import InputError
from data_pipeline.sources.folder import list_folder
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from tests.forked import Program, run_program
from tests.run_state import run_state
from tests.sample_data import folder_pair
from trainer import load_encoder
from trainer.checkpoint import complete_checkpoints, newest_checkpoint
from trainer.config import load_config
from trainer.metrics import read_metrics
from trainer.preflight import plan_run

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
STEPS = 24
# what is the same in every run of one seed; speeds, times and memory are not
EXACT = ("step", "epoch", "lr", "loss", "loss_contrastive", "loss_saliency", "accuracy")
EXACT += ("prototypes", "gradient_norm", "bank_fill", "bank_age", "bank_same_image")
EXACT += ("positive_similarity", "hardest_similarity", "bank_mb_received", "bank_moved_pixels")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shards"
    build_shards(list_scenes(20, 0, 40), root, BuildConfig(7, "ids"))
    return root


def command(shards: Path, run: Path, ranks: int, *settings: str) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [
        *(sys.executable, *(torchrun if ranks > 1 else [])),
        *("-m", "trainer.train", "--recipe", "demo_cpu"),
        *(f"data.shards={shards}", f"run.directory={run}", f"run.steps={STEPS}"),
        *("run.log_every=4", "run.checkpoint_every=4", "run.threads=1", "data.threads=1"),
        *("views.image_size=32", "data.batch_size=8", "bank.capacity=21", "optim.warmup_steps=0"),
        *("model.decoder_channels=16", "model.embedding_dim=8", "run.tensorboard=false"),
        *settings,
    ]


def start(arguments: list[str], largest_file: int = -1) -> Program:
    return Program(arguments, ENVIRONMENT, subprocess.PIPE, subprocess.STDOUT, largest_file)


def finish(arguments: list[str], status: int = 0, largest_file: int = -1) -> str:
    process = start(arguments, largest_file)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def finish_in_full(arguments: list[str]) -> None:
    """From the start of Python on, nothing forked."""
    done = subprocess.run(
        arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def final_state(run: Path) -> dict[str, torch.Tensor]:
    return run_state(run, STEPS)


def assert_same_run(a: Path, b: Path) -> None:
    first, second = final_state(a), final_state(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    rows = [read_metrics(run / "metrics.jsonl") for run in (a, b)]
    exact = [[{key: row[key] for key in EXACT} for row in table] for table in rows]
    assert exact[0] == exact[1]
    assert [row["step"] for row in rows[0]] == list(range(4, STEPS + 1, 4))


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish_in_full(command(shards, run, 2))
    return run


def wait_for_step(run: Path, step: int, process: Program) -> None:
    deadline = time.monotonic() + 120
    while not any(checkpoint.step >= step for checkpoint in complete_checkpoints(run)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.01)


@pytest.mark.parametrize("seed", [0])  # more in benchmarks/kill_matrix.py
def test_killed_at_a_random_moment_and_started_again_gives_the_same_run(
    shards: Path, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    draw, run = np.random.default_rng(seed), tmp_path / "killed"
    for step in sorted(draw.choice([4, 8, 12, 16], 2, replace=False)):
        process = start(command(shards, run, 2))
        wait_for_step(run, int(step), process)
        time.sleep(float(draw.uniform(0, 0.5)))  # anywhere in a step or a checkpoint's write
        kill_all(process)
    finish(command(shards, run, 2))
    assert_same_run(run, undisturbed)


def test_asked_to_stop_it_saves_and_goes_on_to_the_same_result(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    process = start(command(shards, run, 2))
    wait_for_step(run, 4, process)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    stopped = newest_checkpoint(run)
    assert stopped is not None
    assert stopped.step < STEPS
    said = f"stopped at step {stopped.step} of {STEPS} (SIGUSR1), saved in {stopped.path}"
    assert f"maskbank: {said}; the same command continues\n" in output
    output = finish(command(shards, run, 2))
    assert f"going on from step {stopped.step}\n" in output
    assert_end_is_told(output, run, f"maskbank evaluate kmeans {run} --shards {shards} --html")
    first, second = final_state(run), final_state(undisturbed)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_end_is_told(output: str, run: Path, following: str) -> None:
    lines = [line for line in output.splitlines() if line.startswith("maskbank: ")]
    assert lines[0].startswith(f"maskbank: training in {run}: {STEPS} steps of 8 images, ")
    assert re.fullmatch(rf"maskbank: done: {STEPS} steps in [0-9:]+, saved in (.*)", lines[-3])
    assert lines[-3].endswith(f"saved in {run / 'checkpoints' / f'step-{STEPS:08d}'}")
    assert lines[-2] == f"maskbank: next: {following}"
    assert lines[-1] == f"maskbank: then: maskbank predict {run} PHOTOS --output FOLDER"


def test_a_stop_file_ends_one_rank_and_the_end_of_unlabelled_shards_leads_to_clusters(
    shards: Path, tmp_path: Path
) -> None:
    root, run = tmp_path / "no labels", tmp_path / "run"
    listing = folder_pair(tmp_path, [f"p{number}" for number in range(9)])
    build_shards(list_folder(*listing), root, BuildConfig())
    process = start(command(root, run, 1, "run.checkpoint_every=1"))
    wait_for_step(run, 1, process)
    (run / "STOP").touch()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert re.search(rf"stopped at step \d+ of {STEPS} \(the file {run}/STOP\), saved in ", output)
    output = finish(command(root, run, 1))
    assert_end_is_told(output, run, f"maskbank cluster {run} --shards '{root}'")


def kill_all(process: Program) -> None:
    """The launcher and its ranks, which are no process group of their own."""
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_one_rank_goes_on_where_two_stopped(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Batch norm aside, nothing of the run depends on the ranks; the batches are equal exactly."""
    run = tmp_path / "fewer"
    frozen = ("model.batch_norm=frozen", "model.dropout=0", "run.precision=float32")
    finish(command(shards, tmp_path / "two", 2, *frozen))
    process = start(command(shards, run, 2, *frozen))
    wait_for_step(run, 8, process)
    kill_all(process)
    finish(command(shards, run, 1, *frozen))
    two, fewer = final_state(tmp_path / "two"), final_state(run)
    assert two["bank.sample_id"].tolist() == fewer["bank.sample_id"].tolist()
    assert two["bank.sequence"].tolist() == fewer["bank.sequence"].tolist()
    for name, value in two.items():
        if value.is_floating_point():
            torch.testing.assert_close(fewer[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_full_disk_ends_all_ranks_and_the_run_goes_on_once_there_is_space(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the disk: writing a checkpoint fails half-way."""
    run = tmp_path / "full"
    arguments = command(shards, run, 2)
    output = finish(arguments, status=1, largest_file=100_000)
    assert "the checkpoint of step 4 cannot be written ([Errno 27] File too large)" in output
    assert "free space" in output
    assert complete_checkpoints(run) == []
    assert list((run / "checkpoints").iterdir()) == []
    finish(arguments)
    assert_same_run(run, undisturbed)


def test_bad_samples_of_every_rank_are_counted_and_the_run_goes_on(
    shards: Path, tmp_path: Path
) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(shards, root)
    tar = root / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # inside the first image
    tar.write_bytes(data)
    run = tmp_path / "run"
    settings = ("run.steps=5", "run.log_every=5")  # 40 positions: two epochs of 20 samples
    output = finish(command(root, run, 2, *settings))
    assert read_metrics(run / "metrics.jsonl")[-1]["bad_samples"] >= 2
    assert "bad sample replaced" in output
    assert "checksum" in output


def _red_pictures(folder: Path, mask: int) -> Path:
    """Shards of three pictures whose masks are `mask` in one half, and 0 in the other."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(3):
        Image.new("RGB", (41, 33), (200, 0, number)).save(folder / f"images/{number}.png")
        half = Image.new("L", (41, 33))
        half.paste(mask, (0, 0, 20, 33))
        half.save(folder / f"masks/{number}.png")
    build_shards(list_folder(folder / "images", folder / "masks"), folder / "shards", BuildConfig())
    return folder / "shards"


def test_objects_that_are_all_too_small_train_on_nothing_and_say_so(tmp_path: Path) -> None:
    settings = ("run.steps=2", "run.log_every=1", "loss.min_proposal_share=0.999")
    output = finish(command(_red_pictures(tmp_path, 1), tmp_path / "run", 2, *settings))
    assert "no object in any pair of views" in output
    row = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert (row["loss_contrastive"], row["prototypes"], row["bank_fill"]) == (0, 0, 0)


def test_masks_that_are_all_empty_are_refused(tmp_path: Path) -> None:
    shards = _red_pictures(tmp_path, 0)
    settings = [f"data.shards={shards}", f"run.directory={tmp_path / 'run'}"]
    config = load_config("demo_cpu", None, settings)
    with pytest.raises(InputError, match=r"masks of all 3 samples .* are empty"):
        plan_run(config, 1)
    assert not (tmp_path / "run").exists()


def test_it_learns_and_the_encoder_loads(undisturbed: Path) -> None:
    rows = read_metrics(undisturbed / "metrics.jsonl")
    assert rows[-1]["loss_saliency"] < rows[0]["loss_saliency"]
    assert rows[-1]["bank_fill"] == 1
    assert all(0 <= row["data_wait"] <= 1 for row in rows)
    encoder = load_encoder(undisturbed)
    embeddings, saliency = encoder.embed(torch.zeros(1, 3, 30, 42))
    assert embeddings.shape == (1, 8, 30, 42)
    assert saliency.shape == (1, 30, 42)
    assert encoder.step == STEPS
    initial = load_encoder(undisturbed, initial=True)
    assert initial.step == 0
    assert not torch.equal(
        initial.network.embedding_head.weight, encoder.network.embedding_head.weight
    )
    assert (undisturbed / "export/encoder.safetensors").is_file()
    assert json.loads((undisturbed / "environment.json").read_text())["ranks"] == "2"


@pytest.mark.parametrize(
    "settings",
    [
        ("model.batch_norm=sync", "optim.accumulate=2", "data.batch_size=16"),
        ("model.batch_norm=shuffle", "optim.clip_norm=0.1", "data.loader=torch"),
        ("model.freeze=[stem,layer1]", "run.precision=float32", "bank.capacity=0"),
        ("loss.balance_classes=false", "run.tensorboard=true", "data.batch_size=48"),
        ("bank.move=pixels", "bank.mask_same_image=true", "loss.pixels_per_mask=5"),
        ("bank.dtype=bfloat16", "bank.chunk_size=3", "optim.accumulate=2", "bank.capacity=9"),
    ],
)
def test_options_train_on_two_ranks(
    shards: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    finish(command(shards, run, 2, "run.steps=4", "run.log_every=1", *settings))
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)
    moved = "bank.move=pixels" in settings  # there is nothing to attend to in the first step
    assert [row["bank_moved_pixels"] for row in rows] == [float(moved)] * 4
    assert all(row["bank_mb_received"] > 0 for row in rows[1:]) == (rows[-1]["bank_fill"] > 0)
    if "run.tensorboard=true" in settings:
        assert list((run / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (("bank.capacity=10",), True),
        (("bank.capacity=9",), False),
        (("bank.capacity=1000", "bank.mask_same_image=true"), False),
    ],
)
def test_a_bank_near_the_size_of_the_data_set_is_warned_of_once(
    shards: Path, tmp_path: Path, settings: tuple[str, ...], warned: bool
) -> None:
    output = finish(command(shards, tmp_path / "run", 2, "run.steps=1", *settings))
    line = "bank.capacity 10 nears the data set's size, 20 samples: on average 0.5 entries"
    assert output.count(line) == int(warned)
    assert output.count("nears the data set") == int(warned)


def test_a_loss_that_is_not_finite_ends_every_rank(shards: Path, tmp_path: Path) -> None:
    settings = ("optim.lr=1e30", "run.precision=float32", "run.log_every=1")
    output = finish(command(shards, tmp_path / "run", 2, *settings), status=1)
    assert "is not finite, for 20 steps in a row" in output
    assert "lower optim.lr" in output


@pytest.mark.parametrize(
    ("ranks", "settings", "message"),
    [
        (9, (), "gives 9 ranks less than one image each; raise it to 9 or more"),
        (1, ("optim.accumulate=3",), "8 is not divisible by optim.accumulate 3"),
        (8, (), "one image, of which batch norm"),
        (1, ('data.shards=""',), "data.shards is not set"),
        (1, ("data.shards=/nowhere",), "/nowhere holds no manifest.json"),
        (1, ("model.start=none.pth",), "there is no file none.pth"),
        (1, ("run.steps=0", "run.epochs=0.01"), "less than one batch of 8"),
        (1, ("run.stesp=1",), "did you mean run.steps"),
        (1, ("run.device=cuda",), "torch sees no GPU"),
    ],
)
def test_what_is_wrong_is_said_before_a_rank_starts(
    shards: Path, tmp_path: Path, ranks: int, settings: tuple[str, ...], message: str
) -> None:
    if "run.device=cuda" in settings and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = command(shards, tmp_path / "run", 1, *settings)
    arguments = arguments[arguments.index("--recipe") :]
    result = run_program(
        [sys.executable, "-m", "launch.cli", "train", "--nproc", str(ranks), *arguments],
        ENVIRONMENT,
    )
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().startswith("maskbank: ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_run_directory_of_other_settings_or_data_is_refused(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = finish(command(shards, undisturbed, 1, "optim.lr=0.3"), status=2)
    assert "optim.lr was 0.2 and is now 0.3" in output
    build_shards(list_scenes(20, 5, 40), tmp_path / "other", BuildConfig(7, "ids"))
    output = finish(command(tmp_path / "other", undisturbed, 1), status=2)
    assert "was trained on other shards" in output


def test_shards_without_masks_are_refused_by_name(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "images/a.png")
    build_shards(list_folder(tmp_path / "images", None), tmp_path / "shards", BuildConfig())
    output = finish(command(tmp_path / "shards", tmp_path / "run", 1), status=2)
    assert "shard-000000.tar: 1 of 1 samples have no mask, which training needs" in output
