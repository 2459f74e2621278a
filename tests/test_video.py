"""Videos: three readings against masks that are known to the pixel, and on several ranks."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.errors import InputError
from data_pipeline.labelled import LabelledSet
from evaluation.datasets import Place, data_set
from evaluation.label_propagation import PropagationConfig
from evaluation.prototypes import PrototypeConfig
from evaluation.result import Result
from evaluation.saved_head import SavedHead, read_head
from evaluation.video import READINGS, VideoConfig, deal, evaluate_video, frozen_frame, sequences_of
from evaluation.video_metrics import frame_measures
from tests.evaluation_command import evaluate, read_result, refused, tiny_run
from tests.evaluation_data import block_shards, random_encoder
from tests.ranks import run_on_ranks
from tests.sample_data import encode, write
from trainer.distributed import Ranks
from trainer.encoder import Encoder
from trainer.model import PixelOutput
from trainer.settings import ModelConfig

ALONE = Ranks(0, 1, torch.device("cpu"))
SIDE = 48
CELL = 8
PREDICTED = VideoConfig(SIDE, PrototypeConfig("probability"))
# a 16 × 16 square that moves a cell a frame; how much of it can be seen, and where it is
VIDEOS = {
    "whole": [(8, 8), (8, 16), (16, 16), (24, 16), (24, 24)],
    "half": [(0, 0), (8, 0), (8, 8)],
}


def square(top: int, left: int, height: int = 16) -> NDArray[np.bool_]:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top : top + height, left : left + 16] = True
    return mask


def seen(name: str, frame: int) -> NDArray[np.bool_]:
    """What is red in a frame: of the second video the upper half of the square."""
    return square(*VIDEOS[name][frame], 16 if name == "whole" else 8)


def truth(name: str, frame: int) -> NDArray[np.bool_]:
    return square(*VIDEOS[name][frame])


def davis_videos(root: Path, shape: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """DAVIS-2016 with these videos in `val`, cut to `shape`; red on blue."""
    height, width = shape
    lines = []
    for name, places in VIDEOS.items():
        for frame in range(len(places)):
            path = f"480p/{name}/{frame:05d}"
            red = seen(name, frame)[:height, :width, None]
            colours = np.where(red, [255, 0, 0], [0, 0, 255]).astype(np.uint8)
            label = 255 * truth(name, frame)[:height, :width].astype(np.uint8)
            jpeg = encode(colours, "JPEG", quality=95, subsampling=0)
            write(root / "JPEGImages" / f"{path}.jpg", jpeg)
            write(root / "Annotations" / f"{path}.png", encode(label))
            lines.append(f"/JPEGImages/{path}.jpg /Annotations/{path}.png\n")
    write(root / "ImageSets" / "480p" / "val.txt", "".join(reversed(lines)).encode())
    return root


def opened(root: Path) -> LabelledSet:
    return data_set("davis-2016").open(Place(root), "test")


class RedNetwork(nn.Module):
    """Features are colours at a stride; the saliency logit is above 0 where red is above blue."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.config = ModelConfig(output_stride=8, embedding_dim=3, decoder_channels=3)

    def features(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, self.stride)

    def forward(self, images: Tensor) -> PixelOutput:
        colours = self.features(images)
        return PixelOutput(colours, colours[:, :1] - colours[:, 2:])


def red(stride: int) -> Encoder:
    return Encoder(RedNetwork(stride), step=7)  # type: ignore[arg-type]


def red_head(sign: int = 1, width: int = 3) -> SavedHead:
    """Says object where red (the first of the features) is above 0."""
    weight = torch.zeros(2, width)
    weight[1, 0] = sign
    tensors = {"weight": weight, "bias": torch.zeros(2)}
    names = ("background", "object")
    return SavedHead("linear", tensors, names, "davis-2016", SIDE, PrototypeConfig(), 7, "opencv")


def expected(masks: dict[str, list[NDArray[np.bool_]]], shape: tuple[int, int]) -> dict[str, float]:
    """J and F of predicted masks, means over videos of their inner frames."""
    height, width = shape
    found = []
    for name, predicted in masks.items():
        inner = range(1, len(VIDEOS[name]) - 1)
        pairs = [(truth(name, i)[:height, :width].astype(np.int16), predicted[i]) for i in inner]
        found.append(np.mean([frame_measures(*pair) for pair in pairs], axis=0))
    j, f = 100 * np.mean(found, axis=0)
    return {"J": float(j), "F": float(f)}


@pytest.mark.parametrize("reading", ["saliency", "classifier"])
def test_predicted_foreground_by_hand(tmp_path: Path, reading: str) -> None:
    samples = opened(davis_videos(tmp_path))
    head = red_head() if reading == "classifier" else None
    result = evaluate_video(red(1), samples, reading, PREDICTED, ALONE, head=head)  # type: ignore[arg-type]
    assert (result.protocol, result.measure, result.images) == (f"davis-{reading}", "J&F", 8)
    assert result.step == 7
    whole, half = result.parts["whole"], result.parts["half"]
    assert list(result.parts) == ["half", "whole"]
    assert (whole["J mean"], whole["F mean"], whole["frames"]) == (100, 100, 5)
    # half of the square: J is .5, which is not above .5
    assert (half["J mean"], half["J recall"], half["J decay"]) == (50, 0, 0)
    figures = expected(
        {name: [seen(name, i) for i in range(len(VIDEOS[name]))] for name in VIDEOS}, (SIDE, SIDE)
    )
    assert result.metrics["J mean"] == (75,)
    assert result.metrics["J recall"] == (50,)
    assert result.metrics["J mean, all frames"] == (75,)
    assert result.metrics["F mean"] == pytest.approx((figures["F"],))
    assert result.values == pytest.approx(((75 + figures["F"]) / 2,))
    # pixels of all frames: 5 whole squares and 3 halves are found
    assert result.confusion.tolist() == [[8 * 2304 - 8 * 256, 0], [3 * 128, 5 * 256 + 3 * 128]]
    assert result.foreground_iou == pytest.approx(100 * (5 * 256 + 3 * 128) / (8 * 256))


def test_what_is_foreground_is_an_option(tmp_path: Path) -> None:
    samples = opened(davis_videos(tmp_path))
    nothing = replace(PREDICTED, prototype=PrototypeConfig("logit", threshold=99.0))
    result = evaluate_video(red(1), samples, "saliency", nothing, ALONE)
    assert (result.values, result.metrics["F recall"]) == ((0,), (0,))
    assert result.options["prototype"]["threshold"] == 99


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (44, 45)])
@pytest.mark.parametrize("features", ["embedding", "decoder"])
def test_propagation_by_hand(tmp_path: Path, shape: tuple[int, int], features: str) -> None:
    """Squares that fill cells come back as cells do when they are upsampled."""
    height, width = shape
    samples = opened(davis_videos(tmp_path, shape))
    near = PropagationConfig(top_k=1, context=2, radius=3, whole_first_frame=False)
    config = VideoConfig(features=features, propagation=near)  # type: ignore[arg-type]
    result = evaluate_video(red(CELL), samples, "propagation", config, ALONE)
    masks = {
        name: [_through_cells(seen(name, i))[:height, :width] for i in range(len(VIDEOS[name]))]
        for name in VIDEOS
    }
    assert result.parts["whole"]["J mean"] == pytest.approx(
        expected({"whole": masks["whole"]}, shape)["J"], abs=1e-4
    )
    assert 90 < result.parts["whole"]["J mean"] < 100  # corners are lost
    assert result.options["features"] == features
    assert result.options["propagation"]["top_k"] == 1


def test_objects_at_the_edge_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that hang over the edge are continued, in the mask and in the frame."""
    monkeypatch.setitem(VIDEOS, "whole", [(32, 32)] * 3)
    samples = opened(davis_videos(tmp_path, (44, 43)))
    config = VideoConfig(propagation=PropagationConfig(top_k=1, radius=1))
    result = evaluate_video(red(CELL), samples, "propagation", config, ALONE)
    # of 12 × 11 pixels bilinear rounding takes the six at the upper left corner whose products of
    # .5625, .6875, .8125, .9375, … by row and column are below .5
    assert result.parts["whole"]["J mean"] == pytest.approx(100 * 126 / 132, abs=1e-4)
    orange = np.full((44, 43, 3), [250, 120, 0], np.uint8)
    features = frozen_frame(red(CELL), orange, config, ALONE)
    assert features.shape == (3, 6, 6)
    torch.testing.assert_close(features, features[:, :1, :1].expand(3, 6, 6))


def _through_cells(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    cells = torch.tensor(mask[::CELL, ::CELL]).float()[None, None]
    full = F.interpolate(cells, (SIDE, SIDE), mode="bilinear", align_corners=False)[0, 0]
    return (full > 0.5).numpy()


def test_propagation_takes_the_first_mask(tmp_path: Path) -> None:
    """The first frame counts as perfect where all frames count, and not otherwise."""
    samples = opened(davis_videos(tmp_path))
    config = VideoConfig(propagation=PropagationConfig(top_k=1, radius=3))
    result = evaluate_video(red(CELL), samples, "propagation", config, ALONE)
    written = evaluate_video(
        red(CELL), samples, "propagation", config, ALONE, write=tmp_path / "out"
    )
    assert written.values == result.values
    for name, places in VIDEOS.items():
        files = sorted((tmp_path / "out" / "davis-propagation" / name).iterdir())
        assert [file.name for file in files] == [f"{i:05d}.png" for i in range(len(places))]
        first = np.asarray(Image.open(io.BytesIO(files[0].read_bytes())))
        np.testing.assert_array_equal(first, 255 * truth(name, 0).astype(np.uint8))
    assert result.metrics["J mean, all frames"][0] > result.metrics["J mean"][0]


def _on_ranks(ranks: Ranks, root: Path) -> list[Result]:
    samples, encoder = opened(root), random_encoder()
    config = replace(PREDICTED, propagation=PropagationConfig(top_k=3, context=2, radius=3))
    head = red_head(width=16)
    return [
        evaluate_video(encoder, samples, reading, config, ranks, threads=1, head=head)
        for reading in READINGS
    ]


@pytest.mark.slow
def test_ranks_change_nothing(tmp_path: Path) -> None:
    davis_videos(tmp_path)
    alone = run_on_ranks(_on_ranks, 1, tmp_path)[0]
    assert len({result.values for result in alone}) == 3
    for world_size in (2, 3):  # of three ranks one has no video
        for results in run_on_ranks(_on_ranks, world_size, tmp_path):
            for one, other in zip(alone, results, strict=True):
                assert replace(one, seconds=0).as_json() == replace(other, seconds=0).as_json()


def test_sequences_are_dealt_whole_and_evenly() -> None:
    frames = {"a": 5, "b": 3, "c": 2, "d": 2}
    sequences = {name: list(range(count)) for name, count in frames.items()}
    assert deal(sequences, 1) == [["a", "b", "c", "d"]]
    assert deal(sequences, 2) == [["a", "d"], ["b", "c"]]
    assert deal(sequences, 5) == [["a"], ["b"], ["c"], ["d"], []]


def test_frames_are_in_order_whatever_the_list(tmp_path: Path) -> None:
    samples = opened(davis_videos(tmp_path))  # its list is turned round
    sequences = sequences_of(samples)
    assert list(sequences) == ["half", "whole"]
    keys = [samples.key(number) for number in sequences["whole"]]
    assert keys == [f"whole/{i:05d}" for i in range(5)]


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    still = block_shards(tmp_path / "shards", [1, 2])
    with pytest.raises(InputError, match=r"holds no videos: its sample block_000 names no seq"):
        evaluate_video(red(1), still, "saliency", PREDICTED, ALONE)
    davis_videos(tmp_path / "short")
    lines = (tmp_path / "short/ImageSets/480p/val.txt").read_text().splitlines()
    kept = [line for line in lines if "half/00002" not in line]
    (tmp_path / "short/ImageSets/480p/val.txt").write_text("\n".join(kept))
    with pytest.raises(InputError, match=r"1 of 2 sequences have fewer than 3 frames, .*: half;"):
        sequences_of(opened(tmp_path / "short"))


def test_what_the_network_cannot_do_is_refused(tmp_path: Path) -> None:
    samples = opened(davis_videos(tmp_path))
    bare = Encoder(RedNetwork(1), 0, frozenset({"backbone"}), origin="moco.pth")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"moco\.pth has no saliency head; .*--readings"):
        evaluate_video(bare, samples, "saliency", PREDICTED, ALONE)
    with pytest.raises(InputError, match=r"no linear classifier on 3 features of this network"):
        evaluate_video(red(1), samples, "classifier", PREDICTED, ALONE, head=red_head(width=4))
    with pytest.raises(InputError, match="--features is 'pixel'"):
        VideoConfig(features="pixel")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--foreground is 'mask'"):
        VideoConfig(prototype=PrototypeConfig("mask"))


@pytest.mark.slow
def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")  # one thread
    run, root = tiny_run(tmp_path / "run"), davis_videos(tmp_path / "DAVIS")
    place = ("video", run, "--data-set", "davis-2016", "--root", root, "--device", "cpu")
    nearby = ("--foreground", "probability", "--radius", 3, "--context", 2)
    quick = ("--size", 48, *nearby, "--epochs", 2, "--no-augment")
    said = refused(capsys, *place, *quick)
    assert "no split 'train' in" in said
    assert "--readings has 'optical'" in refused(capsys, *place, "--readings", "optical,saliency")
    val = root / "ImageSets/480p/val.txt"
    val.with_name("train.txt").write_bytes(val.read_bytes())
    status, out, error = evaluate(capsys, *place, *quick, "--write", tmp_path / "masks")
    assert status == 0, error
    assert "propagation: 8/8" in error
    for reading in READINGS:
        result = read_result(run, f"davis-2016/davis-{reading}-trained")
        assert (result["protocol"], result["measure"]) == (f"davis-{reading}", "J&F")
        assert (result["data_set"], result["step"], result["images"]) == ("davis-2016", 12, 8)
        mean = {name: values[0] for name, values in result["metrics"].items()}
        assert result["miou"]["values"][0] == pytest.approx(
            (mean["J mean"] + mean["F mean"]) / 2, abs=1e-3
        )
        parts = result["parts"]
        for figure in ("J mean", "F decay"):
            of_parts = [part[figure] for part in parts.values()]
            assert mean[figure] == pytest.approx(np.mean(of_parts), abs=1e-3)
        assert [entry["class"] for entry in result["per_class"]] == ["background", "object"]
        assert len(list((tmp_path / "masks" / f"davis-{reading}").rglob("*.png"))) == 8
        page = (run / "evaluation/davis-2016" / f"davis-{reading}-trained.md").read_text()
        assert "| part | J&F | J mean | J recall |" in page
        assert f"| whole | {parts['whole']['J&F']:.1f} | " in page
    assert out.count("whole") == 3
    assert "first frame's mask propagated of the trained network at step 12, 8" in out.replace(
        "\n", " "
    )
    # the classifier that was learned is a head, which gives the same figures
    head = run / "evaluation/davis-2016/davis-classifier-trained.safetensors"
    assert read_head(head).tensors["weight"].abs().sum() > 0
    only = ("--readings", "classifier", "--head", head, "--output", tmp_path / "again")
    status, out, error = evaluate(capsys, *place, *quick, *only)
    assert status == 0, error
    assert "saliency" not in error
    name = "davis-2016/davis-classifier-trained"
    first, again = read_result(run, name), read_result(tmp_path / "again", name)
    assert again | {"seconds": 0} == first | {"seconds": 0}
