"""The same images for all contenders of a comparison: as files, and as shards of maskbank.

The files are in the released PASCAL layout: images/KEY.jpg, saliency_unsupervised_model/KEY.png,
SegmentationClassAug/KEY.png, sets/trainaug.txt. Nothing but the standard library is imported until
scenes are asked for: peers read the layout too.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SPLIT, MASKS, LABELS = "trainaug", "saliency_unsupervised_model", "SegmentationClassAug"
_SCENES, _SCENE_SIZE = 800, 200  # pictures; pixels a side, about
_LIMIT = 1800.0  # seconds for building shards


@dataclass(frozen=True)
class ComparisonData:
    """Where the data is; None is a form of it that was not given."""

    root: Path | None
    shards: Path | None
    description: str


@dataclass(frozen=True)
class Picture:
    """The files of one sample."""

    image: Path
    mask: Path
    label: Path


def find_data(root: Path | None, shards: Path | None, work: Path) -> ComparisonData:
    """The data that was given; shards of it, or of generated scenes, are made below `work`."""
    if root is None and shards is not None:
        return ComparisonData(None, shards, str(shards.name))
    name = "generated scenes" if root is None else root.name
    if root is None:
        root = work / "scenes"
        _write_scenes(root)
    if shards is None:
        shards = work / "shards" / root.name
        source = ["voc", "--root", str(root), "--split", SPLIT, "--masks", MASKS]
        size = ["--samples-per-shard", "400", "--output", str(shards)]
        # a finished build is found finished
        build = [sys.executable, "-m", "launch.cli", "shards", "build", *source, *size]
        subprocess.run(build, check=True, timeout=_LIMIT, stdin=subprocess.DEVNULL)
    count = len(list_pictures(root))
    return ComparisonData(root, shards, f"{name}, {count:,} images")


def list_pictures(root: Path) -> list[Picture]:
    """All samples of the training split."""
    keys = (root / "sets" / f"{SPLIT}.txt").read_text(encoding="utf-8").split()
    return [
        Picture(
            root / "images" / f"{key}.jpg",
            root / MASKS / f"{key}.png",
            root / LABELS / f"{key}.png",
        )
        for key in keys
    ]


def _write_scenes(root: Path) -> None:
    """Generated scenes as files, unless they are there."""
    names = root / "sets" / f"{SPLIT}.txt"
    if names.exists():
        return
    from PIL import Image

    from data_pipeline.sample import encode_png
    from data_pipeline.sources.scenes import render_scene, scene_size

    for folder in ("images", MASKS, LABELS, "sets"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    keys = []
    for index in range(_SCENES):
        scene = render_scene(0, index, *scene_size(0, index, _SCENE_SIZE))
        key = f"scene_{index:05d}"
        Image.fromarray(scene.image).save(root / "images" / f"{key}.jpg", quality=92)
        salient = ((scene.mask > 0) * 255).astype(scene.mask.dtype)
        (root / MASKS / f"{key}.png").write_bytes(encode_png(salient))
        (root / LABELS / f"{key}.png").write_bytes(encode_png(scene.label))
        keys.append(key)
    # last, so that an unfinished folder is written again
    names.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
