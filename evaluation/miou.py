"""Mean intersection over union from a confusion matrix."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from data_pipeline.sample import Label

Counts = NDArray[np.int64]
Mean = Literal["present", "all"]


@dataclass(frozen=True)
class Score:
    """Scores in percent.

    Attributes:
        miou: mean over the classes.
        iou: [C], NaN where the truth has no pixel of the class.
        pixel_accuracy: share of pixels of the right class.
    """

    miou: float
    iou: NDArray[np.float64]
    pixel_accuracy: float


def confusion(
    truth: Label, prediction: NDArray[np.integer[Any]], classes: int, columns: int
) -> Counts:
    """Pixels of true class (row) and predicted class (column): int64 [classes, columns].

    Pixels whose truth is negative are ignored and count nowhere.
    """
    kept = truth >= 0
    pairs = truth[kept].astype(np.int64) * columns + prediction[kept]
    return np.bincount(pairs, minlength=classes * columns).reshape(classes, columns)


def require_mean(name: str) -> None:
    """Raises InputError unless `name` is present or all."""
    if name not in ("present", "all"):
        raise InputError(f"--mean is {name!r}; it can be present or all")


def score(matrix: Counts, mean: Mean = "present") -> Score:
    """Scores of a confusion matrix [C, C] or [C, C + 1], truth in rows, no class in the last.

    Args:
        matrix: pixels.
        mean: over the classes that the truth has, or over all, where one that it lacks counts 0
            (PASCAL, as published).
    """
    right = np.diag(matrix).astype(np.float64)
    truth, predicted = matrix.sum(1), matrix.sum(0)[: len(matrix)]
    union = truth + predicted - right
    present = truth > 0
    iou = np.full(len(matrix), np.nan)
    iou[present] = 100 * right[present] / union[present]
    total = matrix.sum()
    accuracy = 100 * float(right.sum() / total) if total else float("nan")
    return Score(mean_iou(iou, mean), iou, accuracy)


def mean_iou(iou: NDArray[np.float64], mean: Mean) -> float:
    """The mean of IoUs, NaN for classes that the truth lacks; NaN where it has none at all."""
    present = iou[~np.isnan(iou)]
    if len(present) == 0:
        return float("nan")
    return float(present.sum() / (len(iou) if mean == "all" else len(present)))


def foreground_iou(matrix: Counts) -> float:
    """IoU in percent of everything but class and column 0."""
    both = matrix[1:, 1:].sum()
    union = matrix.sum() - matrix[0, 0]
    return 100 * float(both / union) if union else float("nan")
