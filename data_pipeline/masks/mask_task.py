"""What a worker does: reads some pictures, estimates saliency, writes masks."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from os.path import splitext
from pathlib import Path, PurePosixPath

import numpy as np

from data_pipeline.errors import InputError, SampleError
from data_pipeline.files import atomic_write
from data_pipeline.masks.methods import Method
from data_pipeline.masks.postprocess import PostprocessConfig, make_mask
from data_pipeline.masks.predictor import Predictor, UInt8
from data_pipeline.pictures import encode_png, open_checked, to_rgb, turn
from data_pipeline.sources.item import Failure, Item

MAX_BATCH_PIXELS = 40_000_000  # of pictures that are in memory at a time, unless one has more

Entry = Item | Failure


@dataclass(frozen=True)
class MaskTask:
    """Pictures in order, and in between what is known of others: already failed or skipped.

    Attributes:
        number: of the task.
        entries: pictures and failures.
        output: folder of the masks; the folders of these pictures are there.
        root: folder that the pictures come from, where it is on this machine.
        method, threads: what the predictor is made from.
        config: how a map becomes a mask.
    """

    number: int
    entries: tuple[Entry, ...]
    output: Path
    root: Path | None
    method: Method
    threads: int
    config: PostprocessConfig


@dataclass(frozen=True)
class MaskTaskDone:
    """How many masks of a task were written; its failures, in the order of the entries."""

    number: int
    made: int
    failures: tuple[Failure, ...]


def mask_path(source: str) -> PurePosixPath:
    """Path of a picture's mask below the output: the same tree and stem."""
    return PurePosixPath(splitext(source)[0] + ".png")


@lru_cache(maxsize=1)
def load_predictor(method: Method, threads: int) -> Predictor:
    """The predictor of this process."""
    return method.load(threads)


def run_mask_task(task: MaskTask) -> MaskTaskDone:
    """Makes the masks of a task.

    Raises:
        InputError: the predictor cannot be loaded or fails, or the pictures' folder has vanished.
        OSError: a mask cannot be written.
    """
    failures = {place: e for place, e in enumerate(task.entries) if isinstance(e, Failure)}
    made = 0
    predictor = load_predictor(task.method, task.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata that is not needed
        for batch in _batches(task, predictor.batch_size, failures):
            maps = predictor.predict([image for _, _, image in batch])
            for (place, item, _), saliency in zip(batch, maps, strict=True):
                try:
                    data = encode_png(make_mask(saliency, task.config))
                except SampleError as error:
                    failures[place] = Failure(item.key, item.source, error.stage, error.reason)
                    continue
                _write(task.output / mask_path(item.source), data)
                made += 1
    return MaskTaskDone(task.number, made, tuple(failures[place] for place in sorted(failures)))


def read_picture(item: Item) -> UInt8:
    """A picture, upright, RGB uint8 [H, W, 3].

    Raises:
        SampleError: it cannot be read or decoded.
    """
    image, orientation = open_checked(item.read().image, "image")
    try:
        pixels = to_rgb(image)
    except OSError as error:
        raise SampleError("image", f"cannot be decoded ({error})") from None
    return np.asarray(pixels if image.format == "TIFF" else turn(pixels, orientation))


def _batches(
    task: MaskTask, size: int, failures: dict[int, Failure]
) -> Iterator[list[tuple[int, Item, UInt8]]]:
    """Decoded pictures with their places, up to `size` at a time; puts failures where they are."""
    batch: list[tuple[int, Item, UInt8]] = []
    total = 0
    for place, item in enumerate(task.entries):
        if isinstance(item, Failure):
            continue
        try:
            image = read_picture(item)
        except SampleError as error:
            failures[place] = Failure(item.key, item.source, error.stage, error.reason)
            if task.root is not None and not task.root.is_dir():
                raise InputError(
                    f"{task.root}, which the pictures come from, has vanished; bring it back and "
                    "run the same command again to go on: finished masks are kept"
                ) from None
            continue
        pixels = image.shape[0] * image.shape[1]
        if batch and (len(batch) == size or total + pixels > MAX_BATCH_PIXELS):
            yield batch
            batch, total = [], 0
        batch.append((place, item, image))
        total += pixels
    if batch:
        yield batch


def _write(path: Path, data: bytes) -> None:
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        what = f"cannot be written ({error.strerror}); run the same command again to go on"
        raise OSError(error.errno, what, str(path)) from None
