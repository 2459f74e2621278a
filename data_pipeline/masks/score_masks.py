"""Scores a folder of masks or soft maps against a folder of true masks."""

import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.errors import InputError, SampleError
from data_pipeline.masks.measures import LEVELS, Bool, Float64, measure
from data_pipeline.masks.predictor import UInt8
from data_pipeline.pictures import open_checked, turn
from data_pipeline.sources.item import Failure, FileItem
from data_pipeline.sources.match_trees import match_trees, pictures
from data_pipeline.sources.walk import below, check_folder
from data_pipeline.storage import Location, read_location
from data_pipeline.workers import run_tasks

MASK_FORMATS = ("PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG")
MOST_NAMES = 1000  # of missing and failed pairs that are kept by name
_PAIRS_A_TASK = 32
_LOW = 64  # where no value of any mask is above it, they are ids that were not said to be ids

Progress = Callable[[int], None]


@dataclass(frozen=True)
class ImageScore:
    """Measures of one mask; IoU and F at the adaptive threshold."""

    key: str
    iou: float
    f_beta: float
    mae: float
    s_measure: float


@dataclass
class ScoreReport:
    """Means over all scored masks.

    Attributes:
        images: masks that were scored.
        missing: true masks without a mask; scored as empty ones if `missing_as_empty`.
        extra: masks without a true one.
        failed: pairs that cannot be used.
        iou, f_beta: at the adaptive threshold of each map: twice its mean.
        iou_max, f_beta_max: the greatest mean over all images that one threshold for all of them
            gives, and that threshold, 1…255, from which on a pixel is object.
        mae, s_measure: mean absolute error, structure measure.
        worst: masks of the lowest IoU, the worst first.
        failures: missing, extra and failed ones by name, the first 1,000.
    """

    images: int = 0
    missing: int = 0
    missing_as_empty: bool = False
    extra: int = 0
    failed: int = 0
    iou: float = 0.0
    iou_max: float = 0.0
    iou_max_threshold: int = 0
    f_beta: float = 0.0
    f_beta_max: float = 0.0
    f_beta_max_threshold: int = 0
    mae: float = 0.0
    s_measure: float = 0.0
    worst: list[ImageScore] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    number: int
    pairs: tuple[tuple[str, Location, Location | None], ...]
    ids: bool


@dataclass(frozen=True)
class _Done:
    """Scores of the pairs of a task; curves summed over them: IoU and F, [2, 256]."""

    number: int
    pairs: int
    scores: tuple[ImageScore, ...]
    curves: Float64
    highest: int
    failures: tuple[Failure, ...]


def score_masks(
    masks: Location,
    truth: Location,
    ids: bool | None = None,
    missing_as_empty: bool = False,
    worst: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> ScoreReport:
    """Means over all pairs of a mask and a true mask of the same relative stem.

    A true mask is 0 and 255 (or 0 and 1); where a file holds other values, 1…254 are objects. Masks
    may be soft maps, 0…255; {0, 1} is a binary mask.

    Args:
        masks: folder to score.
        truth: folder of true masks.
        ids: masks hold proposal ids, 1…254; `None`: as `masks.json` says, otherwise they do not.
        missing_as_empty: a true mask without a mask counts as one where nothing was found.
        worst: masks of the lowest IoU to name.
        processes: workers.
        progress: called with the number of pairs done since the last time.

    Raises:
        InputError: a folder is missing, or not one pair can be scored.
    """
    masks, truth = check_folder(masks, "--masks"), check_folder(truth, "--truth")
    report = ScoreReport(missing_as_empty=missing_as_empty)
    if ids is None:
        ids = _holds_ids(masks)
    tasks = _tasks(_pairs(match_trees(truth, masks, None), truth, report), ids)
    curves = np.zeros((2, LEVELS))
    highest = 0
    lowest: list[tuple[float, int, ImageScore]] = []  # a heap: the best of the worst comes first
    for done in _in_order(run_tasks(_score, tasks, processes), progress):
        curves += done.curves
        highest = max(highest, done.highest)
        report.failed += len(done.failures)
        _name(report, done.failures)
        for score in done.scores:
            report.images += 1
            for name in ("iou", "f_beta", "mae", "s_measure"):
                setattr(report, name, getattr(report, name) + getattr(score, name))
            heapq.heappush(lowest, (-score.iou, -report.images, score))
            if len(lowest) > worst:
                heapq.heappop(lowest)
    _check(report, masks, truth, highest, ids)
    _average(report, curves)
    report.worst = [score for _, _, score in sorted(lowest, reverse=True)]
    return report


def count_pairs(truth: Location) -> int:
    """True masks below a folder: about how many pairs there will be."""
    return sum(1 for _ in pictures(check_folder(truth, "--truth")))


def write_report(report: ScoreReport, path: Path) -> None:
    """Writes a report as JSON, atomically."""
    from data_pipeline.files import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(report), indent=1)


def true_mask(values: UInt8) -> Bool:
    """Objects of a true mask of 0 and 255, of 0 and 1, or of ids, where 255 is none."""
    if set(np.unique(values).tolist()) <= {0, 255}:
        return values > 0
    return (values > 0) & (values < 255)


def read_grey(location: Location, stage: str) -> UInt8:
    """Values uint8 [H, W] of a grey or palette file, upright; 16 bits are brought to 8.

    Raises:
        SampleError: it cannot be read, or has colours.
    """
    try:
        data = read_location(location)
    except OSError as error:
        raise SampleError(stage, f"cannot be read ({error.strerror or error})") from None
    image, orientation = open_checked(data, stage, MASK_FORMATS, lenient=True)
    values = _one_channel(image, stage)
    if image.format != "TIFF" and orientation != 1:
        values = np.asarray(turn(Image.fromarray(values), orientation))
    return values


def _one_channel(image: Image.Image, stage: str) -> UInt8:
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode in ("L", "P") and image.format != "GIF":  # of a palette, the indices
        return np.asarray(image)
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise SampleError(stage, "has 32-bit values of unknown range; save it with 8 bits")
        return np.asarray(wide >> 8 if wide.max() > 255 else wide, np.uint8)
    if image.mode == "F":
        raise SampleError(stage, "has floating-point values; save it with 8 bits, 0…255")
    colours = np.asarray(image.convert("RGB"))
    if (colours != colours[..., :1]).any():
        raise SampleError(stage, "has colours; expected one grey channel")
    return np.ascontiguousarray(colours[..., 0])


def _pairs(
    entries: Iterable[FileItem | Failure], truth: Location, report: ScoreReport
) -> Iterator[tuple[str, Location, Location | None]]:
    """(key, true mask, mask); what has no partner goes into the report."""
    for entry in entries:
        if isinstance(entry, FileItem):
            yield entry.key, entry.image, entry.mask
        elif entry.reason == "no mask of that stem":
            report.missing += 1
            if report.missing_as_empty:
                yield entry.key, below(truth, entry.source), None
            _name(report, (Failure(entry.key, entry.source, "missing", "no mask of that stem"),))
        elif entry.reason == "mask without an image":
            report.extra += 1
            _name(report, (Failure(entry.key, entry.source, "extra", "no true mask"),))
        else:
            report.failed += 1
            _name(report, (entry,))


def _tasks(pairs: Iterator[tuple[str, Location, Location | None]], ids: bool) -> Iterator[_Task]:
    number = 0
    while part := tuple(islice(pairs, _PAIRS_A_TASK)):
        yield _Task(number, part, ids)
        number += 1


def _score(task: _Task) -> _Done:
    scores, failures, curves, highest = [], [], np.zeros((2, LEVELS)), 0
    for key, true_file, mask_file in task.pairs:
        try:
            truth = true_mask(read_grey(true_file, "truth"))
            found = np.zeros(truth.shape, np.uint8)
            if mask_file is not None:
                found = read_grey(mask_file, "mask")
                highest = max(highest, int(found.max()))
                found = _as_map(found, task.ids)
            if found.shape != truth.shape:
                sizes = [f"{each.shape[1]}×{each.shape[0]}" for each in (found, truth)]
                raise SampleError("size", f"is {sizes[0]} pixels, the true mask {sizes[1]}")
        except SampleError as error:
            failures.append(Failure(key, str(mask_file), error.stage, error.reason))
            continue
        result = measure(found, truth)
        curves += (result.iou_curve, result.f_curve)
        scores.append(ImageScore(key, result.iou, result.f_beta, result.mae, result.s_measure))
    return _Done(task.number, len(task.pairs), tuple(scores), curves, highest, tuple(failures))


def _as_map(values: UInt8, ids: bool) -> UInt8:
    if ids:
        return np.asarray(((values > 0) & (values < 255)) * np.uint8(255), np.uint8)
    return values * np.uint8(255) if values.max() == 1 else values


def _in_order(results: Iterator[_Done], progress: Progress | None) -> Iterator[_Done]:
    """Sums of floats depend on their order, which must not depend on the processes."""
    waiting: dict[int, _Done] = {}
    following = 0
    for done in results:
        waiting[done.number] = done
        if progress is not None:
            progress(done.pairs)
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _holds_ids(masks: Location) -> bool:
    from data_pipeline.masks.make_masks import RECORD

    if isinstance(masks, Path) and (masks / RECORD).is_file():
        try:
            return bool(json.loads((masks / RECORD).read_bytes()).get("ids", False))
        except (ValueError, AttributeError, OSError):
            return False
    return False


def _check(report: ScoreReport, masks: Location, truth: Location, highest: int, ids: bool) -> None:
    if not report.images:
        first = f"; the first: {report.failures[0].reason}" if report.failures else ""
        raise InputError(
            f"not one mask of {masks} can be scored against {truth} ({report.missing:,} true masks "
            f"without a mask, {report.extra:,} masks without a true one, {report.failed:,} "
            f"unusable{first}); both folders need the same tree and stems"
        )
    if not ids and 1 < highest < _LOW:
        raise InputError(
            f"no mask of {masks} has a value above {highest}, so these are ids rather than maps of "
            "0…255; give --ids"
        )


def _average(report: ScoreReport, curves: Float64) -> None:
    for name in ("iou", "f_beta", "mae", "s_measure"):
        setattr(report, name, getattr(report, name) / report.images)
    for name, curve in zip(("iou", "f_beta"), curves / report.images, strict=True):
        best = 1 + int(np.argmax(curve[1:]))  # at 0 everything would be object
        setattr(report, f"{name}_max", float(curve[best]))
        setattr(report, f"{name}_max_threshold", best)


def _name(report: ScoreReport, failures: tuple[Failure, ...]) -> None:
    report.failures += failures[: max(0, MOST_NAMES - len(report.failures))]
