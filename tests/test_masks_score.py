"""Measures of saliency against slow and literal forms of their definitions; folders of masks."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline.errors import InputError, SampleError
from data_pipeline.masks.measures import measure
from data_pipeline.masks.score_masks import read_grey, score_masks, true_mask, write_report
from tests.sample_data import encode, palette_png, write

ROOT = Path(__file__).parent.parent
UInt8 = NDArray[np.uint8]


def random_pair(seed: int) -> tuple[UInt8, Any]:
    """A soft map and a true mask that it knows something of."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(5, 40, 2)
    smooth = ndimage.gaussian_filter(rng.random((height, width)), 2)
    truth = smooth > np.quantile(smooth, rng.uniform(0.3, 0.95))
    saliency = ndimage.gaussian_filter(rng.random((height, width)), 1) + 0.3 * truth
    saliency = (saliency - saliency.min()) / np.ptp(saliency)
    if seed % 3 == 0:
        saliency = np.round(saliency)
    return np.round(255 * saliency).astype(np.uint8), truth


# ---------------------------------------------------------------- literal forms


def literal_iou_and_f(mask: Any, truth: Any) -> tuple[float, float]:
    hits = (mask & truth).sum()
    precision, recall = hits / max(mask.sum(), 1), hits / truth.sum()
    f_beta = 1.3 * precision * recall / (0.3 * precision + recall) if hits else 0.0
    return hits / (mask | truth).sum(), f_beta


def literal_s_measure(values: Any, truth: Any) -> float:
    """Fan et al., ICCV 2017: equations 1 to 9, λ = 1, α = 0.5."""

    def object_score(part: Any) -> float:
        return 2 * part.mean() / (part.mean() ** 2 + 1 + part.std(ddof=1))

    share = truth.mean()
    objects = share * object_score(values[truth]) + (1 - share) * object_score(1 - values[~truth])
    places = np.argwhere(truth).mean(0).round().astype(int) + 1
    region = 0.0
    for rows in (slice(0, places[0]), slice(places[0], None)):
        for columns in (slice(0, places[1]), slice(places[1], None)):
            x, y = values[rows, columns].ravel(), truth[rows, columns].ravel().astype(float)
            if not len(x):
                continue
            (xx, xy), (_, yy) = np.cov(x, y) if len(x) > 1 else np.zeros((2, 2))
            above = 4 * x.mean() * y.mean() * xy
            below = (x.mean() ** 2 + y.mean() ** 2) * (xx + yy)
            score = above / below if above else float(below == 0)
            region += len(x) / truth.size * score
    return max(0.0, 0.5 * objects + 0.5 * region)


@pytest.mark.parametrize("seed", range(24))
def test_measures_are_those_of_their_definitions(seed: int) -> None:
    saliency, truth = random_pair(seed)
    found = measure(saliency, truth)
    values = saliency / 255
    adaptive = values >= min(2 * values.mean(), values.max())
    assert (found.iou, found.f_beta) == pytest.approx(literal_iou_and_f(adaptive, truth))
    for threshold in (1, 64, 128, 255):
        expected = literal_iou_and_f(saliency >= threshold, truth)
        got = (found.iou_curve[threshold], found.f_curve[threshold])
        assert got == pytest.approx(expected)
    assert found.mae == pytest.approx(np.abs(values - truth).mean())
    assert found.s_measure == pytest.approx(literal_s_measure(values, truth), abs=1e-9)


def test_a_perfect_mask_has_perfect_measures() -> None:
    truth = np.zeros((12, 16), bool)
    truth[3:8, 4:11] = True
    found = measure(truth * np.uint8(255), truth)
    assert (found.iou, found.f_beta, found.mae) == (1.0, 1.0, 0.0)
    assert found.s_measure == pytest.approx(1)
    inverse = measure(~truth * np.uint8(255), truth)
    assert (inverse.iou, inverse.f_beta, inverse.mae, inverse.s_measure) == (0, 0, 1, 0)


def test_a_mask_of_more_than_half_the_picture_is_taken_as_it_is() -> None:
    """Twice its mean is above its maximum."""
    truth = np.zeros((10, 10), bool)
    truth[:7] = True
    assert measure(truth * np.uint8(255), truth).iou == 1.0
    assert measure(truth * np.uint8(200), truth).iou == 1.0


def test_empty_and_full_ones() -> None:
    empty, full = np.zeros((6, 6), np.uint8), np.full((6, 6), 255, np.uint8)
    found = measure(empty, np.zeros((6, 6), bool))
    assert (found.iou, found.f_beta, found.mae, found.s_measure) == pytest.approx((1, 1, 0, 1))
    found = measure(full, np.zeros((6, 6), bool))
    assert (found.iou, found.f_beta, found.mae, found.s_measure) == pytest.approx((0, 0, 1, 0))
    found = measure(full, np.ones((6, 6), bool))
    assert (found.iou, found.f_beta, found.mae, found.s_measure) == pytest.approx((1, 1, 0, 1))
    found = measure(empty, np.ones((6, 6), bool))
    assert (found.iou, found.f_beta, found.mae, found.s_measure) == pytest.approx((0, 0, 1, 0))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 9)])
def test_tiny_masks_have_finite_measures(shape: tuple[int, int]) -> None:
    for bits in range(2 ** (shape[0] * shape[1])):
        truth = np.array([bits >> i & 1 for i in range(shape[0] * shape[1])], bool).reshape(shape)
        found = measure(~truth * np.uint8(255), truth)
        assert np.isfinite([found.iou, found.f_beta, found.mae, found.s_measure]).all()


# ---------------------------------------------------------------- files


def test_what_counts_as_object_in_a_true_mask() -> None:
    assert true_mask(np.array([[0, 255]], np.uint8)).tolist() == [[False, True]]
    assert true_mask(np.array([[0, 1]], np.uint8)).tolist() == [[False, True]]
    ids = np.array([[0, 1, 7, 254, 255]], np.uint8)
    assert true_mask(ids).tolist() == [[False, True, True, True, False]]
    assert not true_mask(np.zeros((2, 2), np.uint8)).any()


@pytest.mark.parametrize(
    "data",
    [
        encode(np.array([[0, 100, 200]], np.uint8)),
        palette_png(np.array([[0, 100, 200]], np.uint8)),
        encode(np.array([[0, 100, 200]], np.uint8).repeat(3).reshape(1, 3, 3)),
        encode((np.array([[0, 100, 200]]) * 257).astype(np.uint16)),
        encode(np.array([[0, 100, 200]], np.uint8), "TIFF"),
        encode(np.array([[0, 100, 200]], np.uint8), "GIF"),
    ],
)
def test_grey_files_of_any_kind_are_read(tmp_path: Path, data: bytes) -> None:
    values = read_grey(write(tmp_path / "x", data), "mask")
    assert (values.dtype, values.tolist()) == (np.uint8, [[0, 100, 200]])


def test_files_that_are_no_maps_are_named(tmp_path: Path) -> None:
    colours = encode(np.array([[[1, 2, 3]]], np.uint8))
    for data, reason in ((colours, "has colours"), (b"x", "cannot be decoded")):
        with pytest.raises(SampleError, match=reason):
            read_grey(write(tmp_path / "x.png", data), "mask")
    with pytest.raises(SampleError, match="cannot be read"):
        read_grey(tmp_path / "gone.png", "mask")


def folders(root: Path, count: int = 6) -> tuple[Path, Path]:
    """Masks and true masks of 10 × 10: truth is the upper half, mask n has n rows of it."""
    truth = np.zeros((10, 10), np.uint8)
    truth[:5] = 255
    for number in range(count):
        mask = np.zeros((10, 10), np.uint8)
        mask[:number] = 255
        write(root / "truth" / "sub" / f"{number}.png", encode(truth))
        write(root / "masks" / "sub" / f"{number}.png", encode(mask))
    return root / "masks", root / "truth"


def test_means_are_over_images_and_the_worst_are_named(tmp_path: Path) -> None:
    masks, truth = folders(tmp_path)
    report = score_masks(masks, truth, worst=3)
    assert (report.images, report.missing, report.extra, report.failed) == (6, 0, 0, 0)
    assert report.iou == pytest.approx(np.mean([0, 0.2, 0.4, 0.6, 0.8, 1]))
    assert report.iou_max == pytest.approx(0.5)
    assert report.mae == pytest.approx(np.mean([0.5, 0.4, 0.3, 0.2, 0.1, 0]))
    assert [each.key for each in report.worst] == ["sub/0", "sub/1", "sub/2"]
    assert report.worst[1].iou == pytest.approx(0.2)


def test_one_threshold_for_all_soft_maps(tmp_path: Path) -> None:
    """The best one is between the two values that object and background have in both maps."""
    truth = np.zeros((10, 10), np.uint8)
    truth[:4] = 255
    for name, low, high in (("a", 90, 120), ("b", 60, 200)):
        saliency = np.where(truth > 0, high, low).astype(np.uint8)
        write(tmp_path / "masks" / f"{name}.png", encode(saliency))
        write(tmp_path / "truth" / f"{name}.png", encode(truth))
    report = score_masks(tmp_path / "masks", tmp_path / "truth")
    assert report.iou_max == report.f_beta_max == 1.0
    assert 90 < report.iou_max_threshold <= 120
    assert report.iou == 1.0  # twice the mean of a is above its maximum


def test_missing_extra_and_damaged_ones_are_counted_by_name(tmp_path: Path) -> None:
    masks, truth = folders(tmp_path)
    (masks / "sub" / "5.png").unlink()
    (truth / "sub" / "0.png").unlink()
    write(masks / "sub" / "1.png", b"x")
    write(masks / "sub" / "2.png", encode(np.zeros((10, 12), np.uint8)))
    report = score_masks(masks, truth)
    assert (report.images, report.missing, report.extra, report.failed) == (2, 1, 1, 2)
    assert report.iou == pytest.approx((0.6 + 0.8) / 2)
    told = {failure.key: (failure.stage, failure.reason) for failure in report.failures}
    assert told["sub/5"] == ("missing", "no mask of that stem")
    assert told["sub/0"] == ("extra", "no true mask")
    assert told["sub/1"][0] == "mask"
    assert told["sub/2"] == ("size", "is 12×10 pixels, the true mask 10×10")
    empty = score_masks(masks, truth, missing_as_empty=True)
    assert (empty.images, empty.missing) == (3, 1)
    assert empty.iou == pytest.approx((0.6 + 0.8 + 0) / 3)


def test_masks_of_ids(tmp_path: Path) -> None:
    masks, truth = folders(tmp_path)
    for number in range(6):
        mask = np.zeros((10, 10), np.uint8)
        mask[:number] = 1
        mask[: number // 2] = 2
        write(masks / "sub" / f"{number}.png", encode(mask))
    assert score_masks(masks, truth, ids=True).iou == pytest.approx(0.5)
    with pytest.raises(InputError, match=r"value above 2.*give --ids"):
        score_masks(masks, truth)
    write(masks / "masks.json", b'{"ids": true}')
    assert score_masks(masks, truth).iou == pytest.approx(0.5)


def test_masks_of_zero_and_one_are_binary(tmp_path: Path) -> None:
    masks, truth = folders(tmp_path)
    for number in range(6):
        mask = np.zeros((10, 10), np.uint8)
        mask[:number] = 1
        write(masks / "sub" / f"{number}.png", encode(mask))
    report = score_masks(masks, truth)
    assert report.iou == pytest.approx(0.5)
    assert report.mae == pytest.approx(0.25)


def test_folders_without_a_pair_are_refused(tmp_path: Path) -> None:
    masks, truth = folders(tmp_path, 2)
    write(tmp_path / "other" / "x.png", encode(np.zeros((4, 4), np.uint8)))
    with pytest.raises(InputError, match=r"not one mask .* can be scored .*2 true masks without"):
        score_masks(tmp_path / "other", truth)
    with pytest.raises(InputError, match="is not a folder; check the path given to --truth"):
        score_masks(masks, tmp_path / "nothing")


@pytest.mark.slow
def test_processes_give_the_same_report(tmp_path: Path) -> None:
    for number in range(100):
        saliency, truth = random_pair(number)
        write(tmp_path / "masks" / f"{number}.png", encode(saliency))
        write(tmp_path / "truth" / f"{number}.png", encode(truth * np.uint8(255)))
    one, three = (
        score_masks(tmp_path / "masks", tmp_path / "truth", worst=5, processes=processes)
        for processes in (1, 3)
    )
    assert one.images == 100
    assert asdict(one) == asdict(three)


@pytest.mark.slow
def test_the_command_shows_a_table_and_writes_json(tmp_path: Path) -> None:
    masks, truth = folders(tmp_path)
    output = tmp_path / "score.json"
    command = [sys.executable, "-m", "data_pipeline.masks.cli", "score", "--masks", str(masks)]
    command += ["--truth", str(truth), "--worst", "2", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "IoU ↑" in done.stderr
    assert "0.5000" in done.stderr
    assert "sub/0" in done.stderr
    assert "sub/3" not in done.stderr
    expected = score_masks(masks, truth, worst=2)
    write_report(expected, tmp_path / "expected.json")
    assert output.read_bytes() == (tmp_path / "expected.json").read_bytes()
    assert json.loads(output.read_text())["iou"] == pytest.approx(0.5)


@pytest.mark.slow
def test_the_benchmark_runs_without_a_data_set() -> None:
    command = [sys.executable, "-m", "benchmarks.masks", "--scenes", "4", "--pictures", "2"]
    command += ["--rounds", "1", "--processes", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "stamps20 is left out: give --root its folder" in done.stdout
    assert done.stdout.count("| scenes, 4 |") == 2
