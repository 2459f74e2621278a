"""What `maskbank predict` writes of an image: a file a kind, in folders that mirror the images'."""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write
from data_pipeline.sample import IGNORE, IGNORE_16_BIT, Label, UInt8, encode_png
from data_pipeline.sources.imagenet_s import IGNORED_PART
from evaluation.palettes import Bytes, class_palette
from evaluation.predict import Prediction
from evaluation.predict_inputs import OUTPUT_KINDS, PictureFile
from evaluation.report_figures import overlay

SUFFIXES = dict(zip(OUTPUT_KINDS, ("png", "png", "jpg", "png", "npz", "png"), strict=True))
_STRIP = 1 << 22  # pixels that are painted at a time
_MAX_8_BIT = 254  # classes, as in the labels of shards
_LARGEST_JPEG = 65_500  # pixels a side


@dataclass(frozen=True)
class Outputs:
    """The folder of predictions.

    Attributes:
        folder: OUTPUT; nothing is written outside it.
        kinds: that are written, of `OUTPUT_KINDS`.
        palette: colours of the classes, uint8 [at least 256, 3], the last that of no class.
        classes: number of classes.
    """

    folder: Path
    kinds: tuple[str, ...]
    palette: Bytes
    classes: int

    def path(self, picture: PictureFile, kind: str) -> Path:
        return self.folder / kind / f"{picture.name}.{SUFFIXES[kind]}"

    def missing(self, picture: PictureFile) -> tuple[str, ...]:
        """The kinds of which this image has no file yet."""
        return tuple(kind for kind in self.kinds if not self.path(picture, kind).is_file())

    def write(
        self,
        picture: PictureFile,
        prediction: Prediction,
        image: Callable[[], UInt8],
        kinds: Sequence[str],
    ) -> None:
        """Writes these kinds.

        Args:
            picture: names the files.
            prediction: on it.
            image: reads it, uint8 [H, W, 3], for overlays.
            kinds: to write.

        Raises:
            InputError: a folder is a link that leads out of the output.
            OSError: as when the disk is full.
        """
        for kind in kinds:
            path = self.path(picture, kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._require_inside(path.parent)
            data = self._encode(kind, picture, prediction, image)
            with atomic_write(path) as file:
                file.write(data)

    def _encode(
        self, kind: str, picture: PictureFile, prediction: Prediction, image: Callable[[], UInt8]
    ) -> bytes:
        classes = prediction.classes
        if kind == "colour":
            return colour_png(classes, self.palette, self.classes)
        if kind == "index":
            return index_png(classes, self.classes)
        if kind == "overlay":
            return overlay_file(image(), classes, self.palette)
        if kind == "imagenet-s":
            return imagenet_s_png(classes)
        if kind == "saliency":
            assert prediction.saliency is not None
            return encode_png((prediction.saliency * 255).round().astype(np.uint8))
        return _embedding_npz(picture, prediction)

    def _require_inside(self, folder: Path) -> None:
        real, root = os.path.realpath(folder), os.path.realpath(self.folder)
        if os.path.commonpath([real, root]) != root:
            raise InputError(
                f"{folder} is a link to {real}, outside --output; remove the link, or give another "
                "folder"
            )


def index_png(classes: Label, count: int) -> bytes:
    """Class indices [H, W] as shards hold labels: 8-bit grey with 255 for none, or 16-bit."""
    if count <= _MAX_8_BIT:
        return encode_png(np.where(classes < 0, IGNORE, classes).astype(np.uint8))
    values = np.where(classes < 0, np.uint16(IGNORE_16_BIT), classes.astype(np.uint16))
    return encode_png(values)


def colour_png(classes: Label, palette: Bytes, count: int) -> bytes:
    """A PNG in the classes' colours; its values are class indices, 255 for none, as PASCAL's.

    More classes than such a file can tell apart make it an ordinary RGB image.
    """
    if count <= _MAX_8_BIT:
        picture = Image.fromarray(np.where(classes < 0, IGNORE, classes).astype(np.uint8))
        colours = palette[: IGNORE + 1].copy()
        colours[IGNORE] = class_palette(IGNORE + 1)[IGNORE]
        picture.putpalette(colours.tobytes())
    else:
        picture = Image.fromarray(palette[classes])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def imagenet_s_png(classes: Label) -> bytes:
    """RGB with red + 256·green the class, as ImageNet-S' server reads it; 1000 for none."""
    values = np.where(classes < 0, IGNORED_PART, classes)
    colours = np.stack([values % 256, values // 256, np.zeros_like(values)], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG")
    return buffer.getvalue()


def overlay_file(image: UInt8, classes: Label, palette: Bytes) -> bytes:
    """The image [H, W, 3] tinted by its classes, with outlines: a JPEG of the same size.

    Or of half the size as long as that is more than a JPEG can have.
    """
    while max(image.shape[:2]) > _LARGEST_JPEG:
        image, classes = image[::2, ::2], classes[::2, ::2]
    height, width = classes.shape
    rows = max(1, _STRIP // width)
    painted = np.empty_like(image)
    for top in range(0, height, rows):  # painting takes a multiple of an image in memory
        below = top + rows + 1  # outlines depend on the next row
        part = overlay(image[top:below], classes[top:below], palette)
        painted[top : top + rows] = part[:rows]
    buffer = io.BytesIO()
    Image.fromarray(painted).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _embedding_npz(picture: PictureFile, prediction: Prediction) -> bytes:
    assert prediction.embedding is not None
    assert prediction.vector is not None
    buffer = io.BytesIO()
    np.savez(
        buffer,
        embedding=prediction.embedding,
        vector=prediction.vector,
        key=np.array(picture.name.encode("utf-8", "backslashreplace").decode()),
        size=np.array(prediction.classes.shape),
    )
    return buffer.getvalue()
