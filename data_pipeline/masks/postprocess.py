"""From a saliency map to a mask, as MaskContrast publishes it: binary, without small segments.

Segments under 1% of the picture are dropped, and pictures whose mask is under 1% are left out
(Van Gansbeke et al., ICCV 2021, supplementary material).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError, SampleError
from data_pipeline.mask_files import connected_components
from data_pipeline.masks.predictor import UInt8

SKIP = "skip"  # stage of a picture that gets no mask because nothing in it is salient
_LEVELS = 256
_ROUNDING = 1e-9  # a mask of exactly the least share is kept

Values = NDArray[np.floating]


def otsu_threshold(values: Values) -> float:
    """The threshold that parts `values` into two classes of least variance (Otsu, 1979).

    Values at or above it are the upper class. On 256 levels between the least and the greatest
    value; infinite where there is only one value.
    """
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return float("inf")
    level = np.minimum(((values - low) / (high - low) * _LEVELS).astype(np.int64), _LEVELS - 1)
    counts = np.bincount(level.ravel(), minlength=_LEVELS).astype(np.float64)
    places = np.arange(_LEVELS)
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sums = np.cumsum(counts * places)
    gap = sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    best = int(np.argmax(below * above * gap**2))
    return low + (best + 1) / _LEVELS * (high - low)


def twice_mean_threshold(values: Values) -> float:
    """Twice the mean, at most the greatest value (Achanta et al., CVPR 2009); zeros: infinite."""
    high = float(values.max())
    return min(2 * float(values.mean()), high) if high > 0 else float("inf")


THRESHOLDS: dict[str, Callable[[Values], float]] = {
    "otsu": otsu_threshold,
    "mean": twice_mean_threshold,
}


@dataclass(frozen=True)
class PostprocessConfig:
    """What decides a mask, given the map.

    Attributes:
        threshold: a number in [0, 1], or how it follows from the map: "otsu", or "mean" for twice
            the mean. Values at or above it are foreground.
        min_segment: connected segments of a smaller share of the picture are dropped.
        min_mask: pictures whose remaining mask is a smaller share get none.
        ids: write segments as proposals 1…254, in the order of their first
            pixels, instead of 0 and 255; of more than 254 the largest.
    """

    threshold: float | str = "otsu"
    min_segment: float = 0.01
    min_mask: float = 0.01
    ids: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.threshold, str):
            if self.threshold not in THRESHOLDS:
                raise InputError(
                    f"--threshold is {self.threshold!r}; it can be a number between 0 and 1, "
                    f"or one of {', '.join(THRESHOLDS)}"
                )
        elif not 0 < self.threshold <= 1:
            raise InputError(f"--threshold is {self.threshold}; it must be above 0 and at most 1")
        for name in ("min_segment", "min_mask"):
            if not 0 <= getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"{option} is {getattr(self, name)}; it is a share of the picture, "
                    "from 0 to less than 1: 0.01 is 1%"
                )


def make_mask(saliency: Values, config: PostprocessConfig) -> UInt8:
    """The mask of a saliency map, uint8 [H, W]: 0 and 255, or proposal ids.

    Args:
        saliency: [H, W], in [0, 1].
        config: threshold and least sizes.

    Raises:
        SampleError: of stage "skip" where too little is salient; of stage "predict" where the map
            holds a value that is no number.
    """
    if not np.isfinite(saliency).all():
        raise SampleError("predict", "the saliency map holds values that are no numbers")
    if isinstance(config.threshold, str):
        threshold = THRESHOLDS[config.threshold](saliency)
    else:
        threshold = config.threshold
    objects = saliency >= threshold
    if not objects.any():
        raise SampleError(SKIP, "nothing is salient")
    parts = connected_components(objects, config.min_segment)
    if config.min_segment > 0:
        objects = parts > 0
    share = float(np.count_nonzero(objects)) / saliency.size
    if not share:
        raise SampleError(SKIP, f"no segment of at least {config.min_segment:.4g} of the picture")
    if share < config.min_mask - _ROUNDING:
        raise SampleError(
            SKIP, f"the mask is under {config.min_mask:.4g} of the picture ({share:.3%})"
        )
    if config.ids:
        return parts
    return np.asarray(objects * np.uint8(255), np.uint8)
