"""Masks for a folder of pictures: the same bytes however they are made, nothing lost silently."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.masks import mask_task
from data_pipeline.masks.make_masks import MakeOptions, MaskReport, make_masks
from data_pipeline.masks.methods import Method, OnnxMethod, PriorMethod, SpectralMethod
from data_pipeline.masks.postprocess import PostprocessConfig
from data_pipeline.masks.predictor import Predictor
from data_pipeline.sample import decode_grey
from data_pipeline.sources.folder import list_folder
from data_pipeline.sources.scenes import render_scene
from tests.sample_data import encode, write

CONFIG = PostprocessConfig(threshold=0.5)
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class RedMethod:
    """A method that needs no time: red is salient. Leaves a line wherever it was loaded."""

    log: Path | None = None
    batch_size: int = 3

    def load(self, threads: int) -> Predictor:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()}\n")
        return Red(self.batch_size)


class Red:
    name = "red"

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        assert 1 <= len(images) <= self.batch_size
        return [image[..., 0].astype(np.float32) / 255 for image in images]


def red_picture(number: int, share: float = 0.25) -> bytes:
    """A PNG with a red rectangle over about `share` of it."""
    image = np.zeros((20, 30 + number, 3), np.uint8)
    image[: round(20 * share), :, 0] = 255
    return encode(image)


def tree(root: Path, count: int = 12) -> Path:
    """Pictures in three folders, of which 2 are skipped, 2 damaged, 2 share a stem, 1 is a GIF."""
    images = root / "images"
    for number in range(count):
        write(images / f"{'abc'[number % 3]}" / f"{number:02d}.png", red_picture(number))
    write(images / "a" / "dark.png", red_picture(0, share=0))
    write(images / "z_dark.png", red_picture(0, share=0))
    write(images / "b" / "broken.jpg", b"no picture")
    write(images / "empty.png", b"")
    write(images / "c" / "two.png", red_picture(1))
    write(images / "c" / "two.jpg", red_picture(1))
    write(images / "old.gif", b"x")
    return images


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def failures(report: MaskReport) -> list[tuple[str, str, str]]:
    lines = report.failures.read_text().splitlines()
    return [(each["source"], each["stage"], each["reason"]) for each in map(json.loads, lines)]


def make(images: Path, output: Path, processes: int = 1, **options: int) -> MaskReport:
    return make_masks(images, output, RedMethod(), CONFIG, MakeOptions(processes, **options))


# ---------------------------------------------------------------- what is written


def test_masks_have_the_tree_and_stems_of_the_pictures(tmp_path: Path) -> None:
    images, output = tree(tmp_path), tmp_path / "masks"
    report = make(images, output)
    assert (report.made, report.kept, report.skipped, report.failed) == (12, 0, 2, 5)
    found = contents(output)
    masks = {f"{'abc'[number % 3]}/{number:02d}.png" for number in range(12)}
    assert set(found) == masks | {"masks.json", "failures.jsonl"}
    for number in range(12):
        mask = decode_grey(found[f"{'abc'[number % 3]}/{number:02d}.png"], "mask")
        expected = np.zeros((20, 30 + number), np.uint8)
        expected[:5] = 255
        np.testing.assert_array_equal(mask, expected)


def test_failures_are_named_in_the_order_of_the_pictures(tmp_path: Path) -> None:
    report = make(tree(tmp_path), tmp_path / "masks")
    assert [(source, stage) for source, stage, _ in failures(report)] == [
        ("a/dark.png", "skip"),
        ("b/broken.jpg", "image"),
        ("c/two.jpg", "match"),
        ("c/two.png", "match"),
        ("empty.png", "image"),
        ("old.gif", "match"),
        ("z_dark.png", "skip"),
    ]
    reasons = {source: reason for source, _, reason in failures(report)}
    assert reasons["a/dark.png"] == "nothing is salient"
    assert reasons["c/two.png"] == (
        "duplicate stem: rename all but one, or give them folders of their own "
        "(c/two.jpg, c/two.png)"
    )
    assert reasons["empty.png"] == "the file is empty"
    assert reasons["old.gif"] == ".gif is not read"


def test_shards_are_built_from_what_was_made(tmp_path: Path) -> None:
    images, output = tree(tmp_path), tmp_path / "masks"
    make(images, output)
    entries = list(list_folder(images, output).entries)
    matched = [entry for entry in entries if not hasattr(entry, "reason")]
    assert len(matched) == 12


def test_a_turned_picture_has_an_upright_mask(tmp_path: Path) -> None:
    stored = np.zeros((20, 30, 3), np.uint8)
    stored[:, :10, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    data = encode(stored, "JPEG", quality=95, exif=exif)
    write(tmp_path / "images" / "turned.jpg", data)
    make(tmp_path / "images", tmp_path / "masks")
    mask = decode_grey((tmp_path / "masks" / "turned.png").read_bytes(), "mask")
    assert mask.shape == (30, 20)
    assert mask[:9].all()
    assert not mask[11:].any()


def test_segments_become_ids(tmp_path: Path) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    image[2:6, 2:6, 0] = image[10:18, 10:18, 0] = 255
    write(tmp_path / "images" / "x.png", encode(image))
    config = PostprocessConfig(threshold=0.5, ids=True)
    make_masks(tmp_path / "images", tmp_path / "masks", RedMethod(), config)
    mask = decode_grey((tmp_path / "masks" / "x.png").read_bytes(), "mask")
    assert np.bincount(mask.ravel()).tolist() == [320, 16, 64]


def test_large_pictures_are_not_in_memory_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, output = tree(tmp_path), tmp_path / "masks"
    sizes: list[int] = []
    monkeypatch.setattr(mask_task, "MAX_BATCH_PIXELS", 1300)
    predict = Red.predict

    def watched(self: Red, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        sizes.append(sum(image.shape[0] * image.shape[1] for image in images))
        return predict(self, images)

    monkeypatch.setattr(Red, "predict", watched)
    assert make(images, output).made == 12
    assert max(sizes) <= 1300
    assert len(sizes) > 12 // 2


# ---------------------------------------------------------------- going on


def test_a_mask_that_exists_is_not_made_again(tmp_path: Path) -> None:
    images, output = tree(tmp_path), tmp_path / "masks"
    make(images, output)
    whole = contents(output)
    own = encode(np.full((20, 30), 255, np.uint8))
    (output / "a" / "00.png").write_bytes(own)
    (output / "b" / "01.png").unlink()
    write(output / "b" / ".07.png.0123456789ab.tmp", b"half a mask")
    report = make(images, output)
    assert (report.made, report.kept, report.skipped, report.failed) == (1, 11, 2, 5)
    assert contents(output) == {**whole, "a/00.png": own}


def test_skipped_pictures_are_not_looked_at_again_but_failed_ones_are(tmp_path: Path) -> None:
    images, output = tree(tmp_path), tmp_path / "masks"
    make(images, output)
    for name in ("a/dark.png", "b/broken.jpg"):
        write(images / name, red_picture(0))
    report = make(images, output)
    assert (report.made, report.skipped) == (1, 2)
    assert (output / "b" / "broken.png").exists()
    (output / "failures.jsonl").unlink()
    report = make(images, output)
    assert (report.made, report.skipped) == (1, 1)
    assert (output / "a" / "dark.png").exists()


def test_what_was_skipped_is_remembered_over_several_interruptions(tmp_path: Path) -> None:
    """A run that is killed early has a shorter list than the one before it."""
    images, output = tree(tmp_path), tmp_path / "masks"
    journal = make(images, output).failures
    first, last = (
        journal.read_bytes().splitlines(True)[0],
        journal.read_bytes().splitlines(True)[-1],
    )
    whole = journal.read_bytes()
    (output / ".failures.jsonl.previous").write_bytes(first + last)
    journal.write_bytes(first + b'{"key": "b/bro')
    for name in ("a/dark.png", "z_dark.png"):
        write(images / name, red_picture(0))
    assert make(images, output).made == 0
    assert journal.read_bytes() == whole
    assert not (output / ".failures.jsonl.previous").exists()


@pytest.mark.parametrize(
    ("method", "config", "told"),
    [
        (PriorMethod(), CONFIG, 'method was "red" and is "prior-1-320-'),
        (RedMethod(), PostprocessConfig(0.6), "threshold was 0.5 and is 0.6 now"),
        (RedMethod(), PostprocessConfig(0.5, ids=True), "ids was false and is true now"),
    ],
)
def test_masks_made_in_another_way_are_not_mixed(
    tmp_path: Path, method: Method, config: PostprocessConfig, told: str
) -> None:
    images, output = tree(tmp_path), tmp_path / "masks"
    make(images, output)
    before = contents(output)
    with pytest.raises(InputError, match="made in another way") as caught:
        make_masks(images, output, method, config)
    assert told in str(caught.value)
    assert contents(output) == before


def test_other_pictures_do_not_go_into_the_same_folder(tmp_path: Path) -> None:
    make(tree(tmp_path), tmp_path / "masks")
    with pytest.raises(InputError, match=r"images was .*images.* and is .*other/images"):
        make(tree(tmp_path / "other"), tmp_path / "masks")


def test_folders_that_cannot_be_the_output_are_refused(tmp_path: Path) -> None:
    images = tree(tmp_path)
    for output in (images, images / "masks"):
        with pytest.raises(InputError, match="masks would be taken for pictures"):
            make(images, output)
    write(tmp_path / "used" / "mine.png", b"x")
    with pytest.raises(InputError, match=r"holds files, but no masks\.json"):
        make(images, tmp_path / "used")
    write(tmp_path / "file", b"")
    with pytest.raises(InputError, match=r"file cannot be used: .*file is not a folder"):
        make(images, tmp_path / "file")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        make(tmp_path / "nothing", tmp_path / "masks")
    assert contents(tmp_path / "used") == {"mine.png": b"x"}


# ---------------------------------------------------------------- processes and nodes


def test_nodes_share_the_work(tmp_path: Path) -> None:
    images, output = tree(tmp_path), tmp_path / "masks"
    make(images, tmp_path / "one")
    reports = [make(images, output, node_rank=rank, num_nodes=3) for rank in (2, 0, 1)]
    assert sum(report.made for report in reports) == 12
    assert max(report.made + report.skipped + report.failed for report in reports) <= 7
    one, shared = contents(tmp_path / "one"), contents(output)
    lines = [
        line for rank in range(3) for line in shared.pop(f"failures-{rank}-of-3.jsonl").splitlines()
    ]
    assert sorted(lines) == sorted(one.pop("failures.jsonl").splitlines())
    assert shared == one


def test_a_node_must_be_one_of_them() -> None:
    with pytest.raises(InputError, match="--node-rank is 2 and --num-nodes 2"):
        MakeOptions(node_rank=2, num_nodes=2)


def test_progress_adds_up(tmp_path: Path) -> None:
    images, told = tree(tmp_path), []
    for _ in range(2):
        totals: list[int] = []
        steps: list[tuple[int, int, int]] = []

        def start(
            total: int, totals: list[int] = totals, steps: list[tuple[int, int, int]] = steps
        ):  # type: ignore[no-untyped-def]
            totals.append(total)
            return lambda *step: steps.append(step)

        make_masks(images, tmp_path / "masks", RedMethod(), CONFIG, progress=start)
        told.append((totals[0], *(sum(column) for column in zip(*steps, strict=True))))
    assert told == [(18, 18, 2, 5)] * 2  # the GIF fails, too, but is none of the pictures


@pytest.mark.slow
def test_processes_make_the_same_bytes(tmp_path: Path) -> None:
    images = tree(tmp_path, count=40)
    make(images, tmp_path / "one")
    log = tmp_path / "loaded"
    report = make_masks(images, tmp_path / "three", RedMethod(log), CONFIG, MakeOptions(3))
    assert (report.made, report.skipped, report.failed) == (40, 2, 5)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    loaded = log.read_text().split()
    assert len(loaded) == len(set(loaded))  # each process has loaded it once
    assert len(loaded) >= 2


@pytest.mark.slow
def test_the_prior_makes_the_same_bytes_in_processes(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / "images" / f"{number}.png", encode(render_scene(5, number, 60, 80).image))
    for processes in (1, 2):
        output = tmp_path / str(processes)
        make_masks(
            tmp_path / "images", output, PriorMethod(), PostprocessConfig(), MakeOptions(processes)
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(list((tmp_path / "1").glob("*.png"))) >= 9


def start_command(images: Path, output: Path, processes: int) -> "subprocess.Popen[str]":
    arguments = ["make", "prior", "--images", str(images), "-o", str(output), "-p", str(processes)]
    return subprocess.Popen(
        [sys.executable, "-m", "data_pipeline.masks.cli", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("how", "processes"), [(signal.SIGINT, 1), (signal.SIGKILL, 2)])
def test_interrupted_it_goes_on(tmp_path: Path, processes: int, how: signal.Signals) -> None:
    images, output = tmp_path / "images", tmp_path / "masks"
    for number in range(40):
        write(images / f"{number:02d}.png", encode(render_scene(5, number, 90, 120).image))
    process = start_command(images, output, processes)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("making masks: ")
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    _, errors = process.communicate(timeout=60)  # it ends when no worker holds the pipe any more
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == (
            "maskbank: interrupted; run the same command again to go on: finished masks are kept"
        )
        assert not list(output.glob("*.tmp"))
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.png")}
    assert 0 < len(before) < 40
    process = start_command(images, output, processes)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert not list(output.glob(".*"))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    make_masks(images, tmp_path / "whole", PriorMethod(), PostprocessConfig())
    assert contents(output) == contents(tmp_path / "whole")


# ---------------------------------------------------------------- methods and the command


def test_methods_travel_to_workers() -> None:
    for method in (
        PriorMethod(200),
        OnnxMethod(Path("x.onnx"), "u2net", mean=(0.5, 0.5, 0.5)),
        SpectralMethod("vit_small_patch16_224.dino", Path("x.pth")),
    ):
        copy = pickle.loads(pickle.dumps(method))
        assert copy == method
        assert hash(copy) == hash(method)


def test_a_method_that_cannot_be_loaded_leaves_nothing(tmp_path: Path) -> None:
    images = tree(tmp_path)
    with pytest.raises(InputError, match=r"gone\.onnx does not exist"):
        make_masks(images, tmp_path / "masks", OnnxMethod(tmp_path / "gone.onnx"), CONFIG)
    assert not (tmp_path / "masks").exists()


def run_command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "data_pipeline.masks.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command_makes_masks_with_a_network(tmp_path: Path) -> None:
    from tests.test_masks_onnx import channel, save

    images = tree(tmp_path)
    network = save(tmp_path / "red.onnx", *channel(0), sides=("height", "width"))
    options = "--size 32 --mean 0,0,0 --std 1,1,1 --activation none -p 2"
    folders = ("--images", str(images), "-o", str(tmp_path / "masks"))
    done = run_command("make", "onnx", "--weights", str(network), *options.split(), *folders)
    assert done.returncode == 0, done.stderr
    make(images, tmp_path / "red")
    expected = {name for name in contents(tmp_path / "red") if name.endswith(".png")}
    assert {name for name in contents(tmp_path / "masks") if name.endswith(".png")} == expected
    for name in expected:
        found = decode_grey((tmp_path / "masks" / name).read_bytes(), "mask")
        truth = decode_grey((tmp_path / "red" / name).read_bytes(), "mask")
        assert (found != truth).mean() < 0.06  # edges are at the network's size
    assert json.loads((tmp_path / "masks" / "masks.json").read_text())["threshold"] == 0.5
    refused = run_command("make", "onnx", "--weights", str(network), "--mean", "half", *folders)
    assert "--mean is 'half'; expected three numbers" in refused.stderr


@pytest.mark.slow
def test_a_vision_transformer_makes_the_same_masks_in_processes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tests.test_masks_spectral import MODEL, state

    for number in range(3):
        write(tmp_path / "images" / f"{number}.png", encode(render_scene(5, number, 60, 80).image))
    save_file(state(), tmp_path / "vit.safetensors")
    method = SpectralMethod(MODEL, tmp_path / "vit.safetensors", size=96)
    for processes in (1, 2):
        make_masks(
            tmp_path / "images", tmp_path / str(processes), method, CONFIG, MakeOptions(processes)
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert list((tmp_path / "1").glob("*.png"))


@pytest.mark.slow
def test_the_command_tells_what_became_of_the_pictures(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(3):
        write(images / f"{number}.png", encode(render_scene(5, number, 60, 80).image))
    write(images / "plain.png", encode(np.full((9, 9, 3), 80, np.uint8)))
    write(images / "broken.jpg", b"no picture")
    common = ("make", "prior", "--images", str(images), "-o", str(tmp_path / "masks"), "-p", "1")
    done = run_command(*common)
    assert done.returncode == 0, done.stderr
    for row in (
        "masks made               │ 3",
        "nothing salient │ 1",
        "failed                   │ 1",
    ):
        assert row in done.stderr
    assert "1  skip: nothing is salient" in done.stderr
    refused = run_command(*common, "--threshold", "0.4")
    assert refused.returncode == 2
    assert 'threshold was "otsu" and is 0.4 now' in refused.stderr


@pytest.mark.slow
def test_without_a_single_mask_the_command_fails(tmp_path: Path) -> None:
    write(tmp_path / "images" / "plain.png", encode(np.full((9, 9, 3), 80, np.uint8)))
    done = run_command(
        "make", "prior", "--images", str(tmp_path / "images"), "-o", str(tmp_path / "masks")
    )
    assert done.returncode == 2
    assert "not one picture got a mask" in done.stderr


@pytest.mark.slow
def test_help_has_an_example_each_and_needs_no_heavy_import() -> None:
    for command in (("make", "prior"), ("make", "onnx"), ("make", "spectral"), ("score",)):
        shown = run_command(*command, "--help")
        assert f"Example: maskbank masks {' '.join(command)}" in shown.stdout
    code = (
        "import sys, data_pipeline.masks.cli; "
        "print([n for n in ('torch', 'skimage', 'onnxruntime', 'scipy') if n in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert loaded.stdout == "[]\n"
