"""The README's path from photographs to a segmentation of them, command by command."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources.scenes import render_scene
from evaluation.photographs.record import FOLDER, HEAD, read_record
from evaluation.saved_head import read_head

ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = 20
NAMES = ("photo {}.jpg", "Straße {}.png", "夏の写真 {}.webp", "IMG_{}.jpg", "holiday {}.tif")
# the recipe's network and steps are for photographs and minutes
SMALL = (
    "model.start=random", "model.backbone=small", "model.output_stride=8", "model.freeze=[]",
    "model.decoder_channels=32", "model.embedding_dim=8", "model.atrous_rates=[1,2,3]",
    "views.image_size=64", "data.batch_size=8", "optim.lr=0.2", "run.steps=40",
)  # fmt: skip


def write_photographs(folder: Path, count: int) -> None:
    """Generated scenes as files: several formats and folders, blanks and unicode in names."""
    for number in range(count):
        path = folder / ("", "Été 2021")[number % 2] / NAMES[number % len(NAMES)].format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render_scene(3, number, 96, 80 + number).image).save(path)


def readme_commands() -> list[list[str]]:
    """The commands of the section, as words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Your own photographs\n")[2].partition("\n1. ")[0]
    block = "\n".join(line for line in section.splitlines() if line.startswith("    "))
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in commands if words[0] == "maskbank"]


def run(words: list[str], folder: Path) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_photographs_become_segments(tmp_path: Path, ranks: int) -> None:
    write_photographs(tmp_path / "photos", PHOTOGRAPHS)
    masks, shards, train, cluster, predict = readme_commands()
    on_ranks = [] if ranks == 1 else ["--nproc", str(ranks)]
    run(masks, tmp_path)
    run(shards, tmp_path)
    said = run([*train, *SMALL, *on_ranks], tmp_path)
    assert f"next: {shlex.join(cluster)}" in said  # each command names the following one
    said = run([*cluster, *on_ranks], tmp_path)
    assert shlex.join(predict[:3]) in said

    record = read_record(tmp_path / "runs/photos" / FOLDER)
    assert record is not None
    assert record.photographs == PHOTOGRAPHS
    assert sum(record.images) + record.without_object == PHOTOGRAPHS
    assert 1 <= record.clusters <= max(1, PHOTOGRAPHS - record.without_object)
    page = (tmp_path / "runs/photos/report.html").read_text(encoding="utf-8")
    assert "Clusters of your photographs" in page
    assert "cluster 01" in page

    (tmp_path / "runs/photos/clusters/names.txt").write_text("01 = bird\n", encoding="utf-8")
    said = run([*predict, "--write", "overlay,index", *on_ranks], tmp_path)
    assert f"{PHOTOGRAPHS} predicted" in said
    found = set()
    for photo in (tmp_path / "photos").rglob("*.*"):
        place = photo.relative_to(tmp_path / "photos").with_suffix("")
        with (
            Image.open(photo) as image,
            Image.open(tmp_path / "predicted/index" / f"{place}.png") as index,
        ):
            assert index.size == image.size
            found |= set(np.unique(np.asarray(index)).tolist())
        assert (tmp_path / "predicted/overlay" / f"{place}.jpg").is_file()
    assert found <= set(range(record.clusters + 1))
    assert len(found) > 1  # more than background
    assert '"bird"' in (tmp_path / "predicted/classes.json").read_text()


@pytest.mark.slow
def test_one_photograph_becomes_segments(tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", 1)
    masks, shards, train, cluster, predict = readme_commands()
    run(masks, tmp_path)
    run(shards, tmp_path)
    run([*train, *SMALL, "run.steps=20"], tmp_path)
    run([*cluster, "--clusters", "12"], tmp_path)
    head = read_head(tmp_path / "runs/photos" / FOLDER / HEAD)
    assert head.classes == ("background", "cluster 01")
    assert "1 predicted" in run(predict, tmp_path)
