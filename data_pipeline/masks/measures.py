"""How well a saliency map or mask agrees with a true mask: IoU, F-measure, MAE, S-measure.

All of one map [H, W] in [0, 1], given as bytes 0…255, against a true mask [H, W] of booleans. What
a threshold decides is known from the two histograms of the map, over object and background.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.masks.predictor import UInt8

BETA_SQUARED = 0.3  # Achanta et al., CVPR 2009
ALPHA = 0.5  # Fan et al., ICCV 2017
LEVELS = 256

Bool = NDArray[np.bool_]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Measures:
    """Of one picture.

    Attributes:
        iou, f_beta: at the adaptive threshold: twice the mean of the map, at most its maximum.
        iou_curve, f_curve: at each threshold 0…255, [256]; a pixel is object at or above it. The
            first entry takes everything for object.
        mae: mean absolute error.
        s_measure: structure measure.
    """

    iou: float
    f_beta: float
    iou_curve: Float64
    f_curve: Float64
    mae: float
    s_measure: float


def measure(saliency: UInt8, truth: Bool) -> Measures:
    """All measures of one map uint8 [H, W] against one true mask bool [H, W].

    Where truth and mask are both empty, they agree: IoU and F are 1.
    """
    inside = np.bincount(saliency[truth], minlength=LEVELS).astype(np.float64)
    outside = np.bincount(saliency[~truth], minlength=LEVELS).astype(np.float64)
    iou, f_beta = _curves(inside, outside)
    values = np.arange(LEVELS) / (LEVELS - 1)
    size = saliency.size
    mean = float((inside + outside) @ values) / size
    # rounding must not put the threshold above the maximum, nor above a binary mask's one value
    highest = int(np.flatnonzero(inside + outside)[-1])
    adaptive = max(1, min(int(np.ceil(2 * mean * (LEVELS - 1) - 1e-6)), highest))
    return Measures(
        iou=float(iou[adaptive]),
        f_beta=float(f_beta[adaptive]),
        iou_curve=iou,
        f_curve=f_beta,
        mae=float(inside @ (1 - values) + outside @ values) / size,
        s_measure=_s_measure(saliency / np.float64(LEVELS - 1), truth, inside, outside),
    )


def _curves(inside: Float64, outside: Float64) -> tuple[Float64, Float64]:
    """IoU and F-measure at each threshold, from the histograms of the map."""
    hits = np.cumsum(inside[::-1])[::-1]
    false = np.cumsum(outside[::-1])[::-1]
    union = inside.sum() + false
    iou = np.divide(hits, union, out=np.ones(LEVELS), where=union > 0)
    # F = (1 + β²) P R / (β² P + R), without the quotients in between
    weighted = BETA_SQUARED * inside.sum() + hits + false
    f_beta = np.divide((1 + BETA_SQUARED) * hits, weighted, out=np.ones(LEVELS), where=weighted > 0)
    return iou, f_beta


def _s_measure(values: Float64, truth: Bool, inside: Float64, outside: Float64) -> float:
    """Structure measure (Fan et al., ICCV 2017): α S_object + (1 - α) S_region, at least 0."""
    share = float(truth.mean())
    if share == 0:
        return 1 - float(values.mean())
    if share == 1:
        return float(values.mean())
    objects = share * _object_score(inside) + (1 - share) * _object_score(outside[::-1])
    return max(0.0, float(ALPHA * objects + (1 - ALPHA) * _region_score(values, truth)))


def _object_score(counts: Float64) -> float:
    """How high and how even the map is over the object: equation 4 of the paper, λ = 1.

    Args:
        counts: histogram of the map over the object, [256].
    """
    levels = np.arange(LEVELS) / (LEVELS - 1)
    total = float(counts.sum())
    mean = float(counts @ levels) / total
    variance = float(counts @ (levels - mean) ** 2) / max(total - 1, 1)
    eps = float(np.finfo(np.float64).eps)
    return 2 * mean / (mean**2 + 1 + math.sqrt(variance) + eps)


def _region_score(values: Float64, truth: Bool) -> float:
    """Structural similarity of the four parts around the object's centroid, by their sizes."""
    height, width = truth.shape
    rows, columns = truth.sum(1), truth.sum(0)
    total = rows.sum()
    # the published code's centroid counts from 1, and its parts end with it
    y = round(float(rows @ np.arange(height)) / total) + 1
    x = round(float(columns @ np.arange(width)) / total) + 1
    score = 0.0
    for part in (np.s_[:y, :x], np.s_[:y, x:], np.s_[y:, :x], np.s_[y:, x:]):
        if truth[part].size:
            weight = truth[part].size / truth.size
            score += weight * _similarity(values[part], truth[part].astype(np.float64))
    return score


def _similarity(values: Float64, truth: Float64) -> float:
    """SSIM of one part as a whole, without constants."""
    count = values.size
    mean, true_mean = float(values.mean()), float(truth.mean())
    centred, true_centred = values - mean, truth - true_mean
    divisor = max(count - 1, 1)
    variance = float((centred**2).sum()) / divisor
    true_variance = float((true_centred**2).sum()) / divisor
    covariance = float((centred * true_centred).sum()) / divisor
    above = 4 * mean * true_mean * covariance
    below = (mean**2 + true_mean**2) * (variance + true_variance)
    if above != 0:
        return above / (below + float(np.finfo(np.float64).eps))
    return 1.0 if below == 0 else 0.0
