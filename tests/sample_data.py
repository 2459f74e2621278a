"""Small data sets made on the spot: pictures, folders, PASCAL trees, and shards of scenes."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.build_config import BuildConfig
from data_pipeline.manifest import Manifest
from data_pipeline.sample import RawSample
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards

UInt8 = NDArray[np.uint8]
HEIGHT, WIDTH = 20, 30


def picture(number: int = 0, height: int = HEIGHT, width: int = WIDTH) -> UInt8:
    """RGB [H, W, 3]: a smooth picture without any symmetry, so that every turn of it shows."""
    rows, columns = np.mgrid[:height, :width]
    red, green = 40 + 200 * columns / width, 40 + 200 * rows / height
    blue = 255 * ((rows < height / 3) & (columns < width / 4)) + 0.0 * rows
    return np.stack([red, green, (blue + 37 * number) % 256], -1).astype(np.uint8)


def object_mask(number: int = 0, height: int = HEIGHT, width: int = WIDTH) -> UInt8:
    """Object ids [H, W]: 1 in the upper left corner, 2 below it; no symmetry."""
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 3, : width // 4] = 1
    mask[height // 2 : height - 2 - number % 3, 1 : width // 3] = 2
    return mask


def encode(values: Any, form: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    """The bytes of an image file; `values` is an array or a PIL image."""
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def palette_png(values: UInt8) -> bytes:
    """A palette PNG whose colours have nothing to do with the indices, as PASCAL's labels."""
    indexed = Image.frombytes("P", values.shape[::-1], values.tobytes())
    colours = [(255 - 7 * i % 256, 31 * i % 256, 101 * i % 256) for i in range(256)]
    indexed.putpalette([channel for colour in colours for channel in colour])
    return encode(indexed)


def write(path: Path, data: bytes) -> Path:
    """Writes a file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def folder_pair(root: Path, names: Sequence[str], labels: bool = False) -> tuple[Path, Path]:
    """`root/images/NAME.jpg` and `root/masks/NAME.png` (and `root/labels/NAME.png`)."""
    for number, name in enumerate(names):
        write(root / "images" / f"{name}.jpg", encode(picture(number), "JPEG", quality=90))
        write(root / "masks" / f"{name}.png", encode(object_mask(number)))
        if labels:
            write(root / "labels" / f"{name}.png", palette_png(object_mask(number)))
    return root / "images", root / "masks"


def released_tree(root: Path, splits: dict[str, Sequence[str]]) -> Path:
    """The layout of the released archive, with both kinds of masks."""
    return _tree(
        root,
        splits,
        "images",
        "SegmentationClassAug",
        "sets",
        ("saliency_supervised_model", "saliency_unsupervised_model"),
    )


def vocdevkit_tree(root: Path, splits: dict[str, Sequence[str]]) -> Path:
    """VOCdevkit as PASCAL ships it: no masks; `root` is the folder above VOC2012."""
    _tree(root / "VOC2012", splits, "JPEGImages", "SegmentationClass", "ImageSets/Segmentation", ())
    return root


def _tree(
    root: Path,
    splits: dict[str, Sequence[str]],
    images: str,
    labels: str,
    sets: str,
    masks: Sequence[str],
) -> Path:
    for split, names in splits.items():
        write(root / sets / f"{split}.txt", "".join(f"{name}\n" for name in names).encode())
        for number, name in enumerate(names):
            write(root / images / f"{name}.jpg", encode(picture(number), "JPEG", quality=90))
            label = object_mask(number)
            label[0] = 255
            write(root / labels / f"{name}.png", palette_png(label))
            for folder in masks:
                write(root / folder / f"{name}.png", encode(object_mask(number)))
    return root


def build_scene_shards(
    root: Path, count: int, size: int = 48, samples_per_shard: int = 10, seed: int = 0
) -> Manifest:
    """Shards of generated scenes: image, mask and label in every sample."""
    config = BuildConfig(samples_per_shard, "ids")
    manifest = build_shards(list_scenes(count, seed, size), root, config)
    assert manifest is not None
    return manifest


class BytesItem:
    """A sample whose bytes are given; what is not there is `None`."""

    def __init__(
        self, key: str, image: bytes, mask: bytes | None = None, label: bytes | None = None
    ) -> None:
        self.key = key
        self.source = f"memory/{key}"
        self.raw = RawSample(image, mask, label)

    def read(self) -> RawSample:
        return self.raw

    def sizes(self) -> tuple[int, ...]:
        return ()


def checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of everything in a folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def flip_byte(path: Path, offset: int) -> None:
    """Changes one byte and nothing else, not even the size."""
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 0xFF]))
