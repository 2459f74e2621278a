"""Contenders of a comparison: what is counted, what fails, and what the peers are fed."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.compare_webdataset import TwoViews
from benchmarks.comparison_data import ComparisonData, find_data
from benchmarks.contender import descendants
from benchmarks.contender_process import ContenderProcess
from benchmarks.dilated_resnet import dilated_resnet18
from benchmarks.environments import NotInstalled, peer_python
from benchmarks.side_by_side import CONTENDERS, Contender, Result, compare, table, write_lines
from tests.sample_data import released_tree
from tests.side_by_side_contender import OWN_MB, SHARED_MB, WORKER_SECONDS
from trainer.backbones import build_backbone
from trainer.encoder import load_encoder

MODULE = "tests.side_by_side_contender"


def options(folder: Path, **changed: object) -> argparse.Namespace:
    values = {"rounds": 2, "steps": 3, "size": 8, "batch": 5, "workers": 0, "settings": []}
    limits = {"save": None, "pause": 0.0, "start_limit": 60.0, "window_limit": 60.0}
    where = {"work": folder, "environments": folder / "environments"}
    return argparse.Namespace(**{**values, **limits, **where, **changed})


def contender(name: str, behave: str = "well") -> Contender:
    return Contender(name, MODULE, f"behaves {behave}", ("--behave", behave))


def test_windows_count_images_work_of_workers_and_shared_memory_once(tmp_path: Path) -> None:
    data = ComparisonData(tmp_path, None, "no data")
    (result,) = compare([contender("a")], data, options(tmp_path))
    assert [(row["steps"], row["images"]) for row in result.windows] == [(3, 15)] * 2
    # 3 steps before it is ready, then in each round 2 that were made before and 3 that count
    assert [row["loss"] for row in result.windows] == [1 / 8, 1 / 13]
    for row in result.windows:
        assert row["cpu_seconds"] > 0.9 * 3 * WORKER_SECONDS
        held = row["peak_rss_mb"] * 1e6 / 1024**2
        # and two interpreters; the shared memory for each process would be another 64
        assert SHARED_MB + OWN_MB < held < 1.8 * SHARED_MB + OWN_MB
    assert "printed by a library" in (tmp_path / "logs/a.log").read_text()


@pytest.mark.slow
def test_who_fails_or_hangs_has_a_row_and_ends_nobody_else(tmp_path: Path) -> None:
    data = ComparisonData(tmp_path, None, "no data")
    absent = Contender("shards", MODULE, "needs what is not there", needs=("shards",))
    missing = Contender("e", MODULE, "is nowhere", environment="e", packages=("none",))
    who = [contender("f", "fail"), contender("a"), contender("h", "hang"), absent, missing]
    (tmp_path / "file").touch()
    chosen = options(tmp_path, window_limit=5.0, rounds=1, environments=tmp_path / "file")
    results = compare(who, data, chosen)
    reasons = [result.not_run for result in results]
    assert reasons[0] == "ended with status 1: the network is not there"
    assert reasons[1] == ""
    assert reasons[2] == "failed in round 1: no answer within 5 s"
    assert reasons[3] == "needs --shards"
    assert reasons[4].endswith("cannot hold an environment (Not a directory)")
    rows = [line for line in table(results, data, chosen).splitlines() if line.startswith("| ")]
    assert "not run: ended with status 1" in rows[1]
    assert rows[2].count("1.00 (1.00–1.00)") == 2  # the first that ran is what others are held to
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    write_lines(tmp_path / "rows.jsonl", results, data)
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["not_run"] for row in written] == reasons
    assert written[1]["windows"][0]["images"] == 15


def test_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    def windows(*images: int) -> list[dict[str, float]]:
        return [
            {"images": count, "seconds": 1, "cpu_seconds": 2, "peak_rss_mb": 7} for count in images
        ]

    results = [
        Result(contender("a"), windows=windows(100, 10, 20)),
        Result(contender("b"), windows=windows(200, 10, 10)),
    ]
    text = table(results, ComparisonData(None, None, "no data"), options(tmp_path, rounds=3))
    assert "| b: behaves well | 10.0 (10.0–200.0) | 1.00 (0.50–2.00) | 5.0 (5.0–100.0) |" in text


def test_a_contender_ends_with_its_workers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", MODULE, "--contender"]
    process = ContenderProcess(command, tmp_path / "log", 60.0)
    members = descendants(process._process.pid)
    assert len(members) == 2
    process.end()
    assert process._process.returncode == 0
    for member in members:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(member)], capture_output=True)
        assert state.stdout.decode().strip()[:1] in ("", "Z")


@pytest.mark.slow
def test_maskbank_takes_part_with_its_own_training_loop(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(8)]
    root = released_tree(tmp_path / "data", {"trainaug": names})
    data = find_data(root, None, tmp_path / "work")
    small = ("model.backbone=small", "model.decoder_channels=16", "model.embedding_dim=8")
    (ours,) = (one for one in CONTENDERS if one.id == "maskbank")
    chosen = options(
        tmp_path, size=32, batch=4, rounds=1, settings=list(small), save=tmp_path / "encoders"
    )
    (result,) = compare([ours], data, chosen)
    assert not result.not_run
    assert [row["images"] for row in result.windows] == [12]
    assert result.windows[0]["loss"] > 0
    encoder = load_encoder(tmp_path / "encoders/maskbank.safetensors")
    assert encoder.step == 3 + result.ready["settings"]["prefetched"] + 3
    assert encoder.network.config.embedding_dim == 8
    assert encoder.embed(torch.zeros(1, 3, 32, 32))[0].shape == (1, 8, 32, 32)


def test_an_environment_without_packages_is_this_one(tmp_path: Path) -> None:
    assert peer_python("none", (), tmp_path) == Path(sys.executable)
    with pytest.raises(NotInstalled, match="took more than 0 s"):
        peer_python("slow", ("x",), tmp_path, limit=0.01)


def test_the_peers_backbone_is_ours() -> None:
    ours, _ = build_backbone("resnet18", 8)
    theirs = dilated_resnet18()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images), ours.eval()(images))


def test_crops_are_drawn_again_until_the_mask_covers_enough() -> None:
    """An object in one corner: most crops miss it, none that is handed out does."""
    torch.manual_seed(0)
    mask = np.zeros((80, 120), np.uint8)
    mask[:16, :16] = 1
    files = [io.BytesIO(), io.BytesIO()]
    Image.fromarray(np.repeat(mask[..., None] * 200, 3, 2)).save(files[0], "PNG")
    Image.fromarray(mask).save(files[1], "PNG")
    make = TwoViews(24)
    for _ in range(20):
        *images, first, second, _ = make(("k", files[0].getvalue(), files[1].getvalue()))
        for image, view in zip(images, (first, second), strict=True):
            assert image.shape == (3, 24, 24)
            assert set(view.unique().tolist()) in ({0, 1}, {255})
            if 1 in view:  # image and mask are of the same window, mirrored alike
                grey = image.mean(0)
                assert grey[view == 1].mean() > grey[view == 0].mean()
    empty = io.BytesIO()
    Image.fromarray(np.zeros_like(mask)).save(empty, "PNG")
    *_, first, second, _ = make(("k", files[0].getvalue(), empty.getvalue()))
    assert first.unique().tolist() == second.unique().tolist() == [255]
