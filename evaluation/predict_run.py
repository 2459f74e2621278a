"""Predicts many image files, spread over the ranks; what cannot be read is left out and listed."""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import SampleError
from data_pipeline.files import atomic_write, encode_json
from data_pipeline.pictures import read_picture
from data_pipeline.sample import UInt8
from evaluation.features import own_samples, shown
from evaluation.predict import Prediction, Predictor
from evaluation.predict_inputs import PictureFile
from evaluation.predict_outputs import Outputs
from trainer.distributed import Ranks, all_reduce_sum, barrier

FAILURES = "failures.jsonl"
_KEPT_PIXELS = 1 << 22  # larger images are read again for their overlay instead of kept


@dataclass(frozen=True)
class Counts:
    """Images that were predicted, that had all outputs before, and that could not be read."""

    done: int
    present: int
    failed: int


@dataclass(frozen=True)
class _Read:
    """An image that was read.

    Attributes:
        picture: which.
        kinds: to write.
        resized: as the network sees it, or None where it is taken whole.
        size: its own (H, W).
        image: uint8 [H, W, 3], or None where it is to be read again.
    """

    picture: PictureFile
    kinds: tuple[str, ...]
    resized: Tensor | None
    size: tuple[int, int]
    image: UInt8 | None


@dataclass(frozen=True)
class _Unreadable:
    picture: PictureFile
    stage: str
    reason: str


def predict_files(
    predictor: Predictor,
    pictures: list[PictureFile],
    outputs: Outputs,
    ranks: Ranks,
    batch_size: int = 16,
    threads: int = 2,
    overwrite: bool = False,
    lenient: bool = False,
) -> Counts:
    """Predicts the pictures and writes what `outputs` says; the same counts on every rank.

    `failures.jsonl` in the output names what could not be read, and is absent if there is nothing.

    Args:
        predictor: on this rank's device.
        pictures: the same on every rank.
        outputs: where to.
        ranks: that share the work.
        batch_size: images a forward pass; whole images are taken one at a time.
        threads: that read, and as many that write.
        overwrite: outputs that are there are made again; else only what is missing.
        lenient: see `read_picture`.

    Raises:
        OSError: an output cannot be written.
    """
    mine = [pictures[i] for i in own_samples(len(pictures), ranks).tolist()]
    todo = [(one, outputs.kinds if overwrite else outputs.missing(one)) for one in mine]
    wanted = [each for each in todo if each[1]]
    batch_size = 1 if predictor.config.whole else batch_size
    failed = done = 0
    part = outputs.folder / f".{FAILURES}.{ranks.rank}"
    batches = _batches(predictor, wanted, batch_size, threads, lenient)
    with part.open("wb") as failures, ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[None]] = deque()
        for batch in shown(batches, "predicting", -(-len(wanted) // batch_size), ranks):
            for each in batch:
                if isinstance(each, _Unreadable):
                    failures.write(_line(each))
                    failed += 1
            read = [each for each in batch if isinstance(each, _Read)]
            for each, prediction in zip(read, _predictions(predictor, read, lenient), strict=True):
                while len(pending) > threads:
                    pending.popleft().result()
                pending.append(pool.submit(_write, outputs, each, prediction, lenient))
                done += 1
        for future in pending:
            future.result()
    counts = torch.tensor([done, len(mine) - len(wanted), failed], device=ranks.device)
    totals = all_reduce_sum(counts, ranks).tolist()
    if ranks.is_main:
        _merge_failures(outputs.folder, ranks.world_size)
    barrier(ranks)
    return Counts(*totals)


def _predictions(predictor: Predictor, read: list[_Read], lenient: bool) -> Iterator[Prediction]:
    if not read:
        return
    if predictor.config.whole:
        for each in read:
            yield predictor.predict(_image(each, lenient))
        return
    images = [each.resized for each in read if each.resized is not None]
    yield from predictor.predict_resized(images, [each.size for each in read])


def _write(outputs: Outputs, each: _Read, prediction: Prediction, lenient: bool) -> None:
    outputs.write(each.picture, prediction, partial(_image, each, lenient), each.kinds)


def _image(each: _Read, lenient: bool) -> UInt8:
    return read_picture(each.picture.path, lenient) if each.image is None else each.image


def _batches(
    predictor: Predictor,
    wanted: list[tuple[PictureFile, tuple[str, ...]]],
    batch_size: int,
    threads: int,
    lenient: bool,
) -> Iterator[list[_Read | _Unreadable]]:
    """The images, `batch_size` at a time, read ahead by one batch."""
    parts = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Future[_Read | _Unreadable]] = []
        for part in [*parts, []]:
            current = ahead
            ahead = [pool.submit(_read, predictor, *each, lenient) for each in part]
            if current:
                yield [future.result() for future in current]


def _read(
    predictor: Predictor, picture: PictureFile, kinds: tuple[str, ...], lenient: bool
) -> _Read | _Unreadable:
    whole = predictor.config.whole
    try:
        image = read_picture(picture.path, lenient)
        resized = None if whole else predictor.resized(image)
    except SampleError as error:
        return _Unreadable(picture, error.stage, error.reason)
    except OSError as error:
        return _Unreadable(picture, "read", error.strerror or str(error))
    size = (image.shape[0], image.shape[1])
    kept = whole or ("overlay" in kinds and size[0] * size[1] <= _KEPT_PIXELS)
    return _Read(picture, kinds, resized, size, image if kept else None)


def _line(failure: _Unreadable) -> bytes:
    entry = {"path": failure.picture.path, "stage": failure.stage, "reason": failure.reason}
    return encode_json(entry) + b"\n"


def _merge_failures(folder: Path, world_size: int) -> None:
    """One sorted list of all ranks' failures."""
    parts = [folder / f".{FAILURES}.{rank}" for rank in range(world_size)]
    lines = [line for part in parts for line in part.read_bytes().splitlines(keepends=True)]
    path = folder / FAILURES
    if lines:
        with atomic_write(path) as file:
            file.writelines(sorted(lines, key=lambda line: str(json.loads(line)["path"])))
    else:
        path.unlink(missing_ok=True)
    for part in parts:
        with suppress(OSError):
            part.unlink()
