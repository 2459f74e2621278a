"""The measures of ImageNet-S: mIoU, boundary mIoU, four object sizes, F-beta, image accuracy.

Gao et al., "Large-scale Unsupervised Semantic Segmentation", TPAMI 2022, section 3, with the values
that its evaluator (LUSSeg/ImageNet-S) has where the paper leaves them open.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter

from data_pipeline.errors import InputError

Integers = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]
State = NDArray[Any]  # of int64 or float64

BETA_SQUARED = 0.3
DILATION_RATIO = 0.03  # of the image diagonal; Cheng et al. take .02 for Boundary IoU
SIZES = ("small", "medium_small", "medium_large", "large")
LARGEST_PERCENT = (5, 25, 50, 100)  # of the image, of each size
_ROWS = ("", *(f"_{size}" for size in SIZES))  # all pixels, then those of each size
_OUTSIDE = -2  # no class, and not −1 either


class ImageNetSMetrics:
    """Sums over images from which all measures follow; ranks add theirs.

    Ignored pixels (label below 0) count nowhere. A predicted pixel of −1 (no class) is wrong
    wherever it is, and is foreground. Every mean over classes is over those that the truth has,
    background among them; a class that is predicted and is not in the truth costs the others, whose
    pixels it took. (The evaluator's `mIoU` counts absent classes as 0, which in its own validation
    and test sets is the same: they have every class.)

    Args:
        classes: number of classes with background, which is 0.
        dilation_ratio: width of the boundary, as a share of the image diagonal.

    Raises:
        InputError: there are fewer than two classes.
    """

    def __init__(self, classes: int, dilation_ratio: float = DILATION_RATIO) -> None:
        if classes < 2:
            raise InputError(f"{classes} classes cannot be scored; give background and one other")
        self.classes = classes
        self.dilation_ratio = dilation_ratio
        shape = (len(_ROWS), 3, classes)  # intersection, truth, prediction
        self._arrays: dict[str, State] = {
            "pixels": np.zeros(shape, np.int64),
            "boundary_pixels": np.zeros(shape, np.int64),
            "images": np.zeros(1, np.int64),
            "right_images": np.zeros(1, np.int64),
            "f_beta": np.zeros(1, np.float64),
        }

    def arrays(self) -> dict[str, State]:
        """The state itself, no copy: sums over ranks may be written into these arrays.

        int64 [5, 3, C] `pixels` and `boundary_pixels`: all pixels and those of each size; in both
        maps, in the truth, in the prediction; by class. int64 [1] `images` and `right_images`,
        float64 [1] `f_beta`: number of images, of right ones, sum of F-beta.
        """
        return self._arrays

    def merge(self, arrays: Mapping[str, State]) -> None:
        """Adds what another one of the same number of classes has seen."""
        for name, array in self._arrays.items():
            array += arrays[name]

    def add(self, label: Integers, prediction: Integers) -> None:
        """Counts one image; one without any pixel that is not ignored is left out.

        Args:
            label: [H, W], 0 … C − 1, negative ignored.
            prediction: [H, W], 0 … C − 1, −1 no class. Below ignored pixels it does not count, but
                ends and starts boundaries like anywhere else, as in the evaluator.

        Raises:
            InputError: shapes differ, or a value is out of range.
        """
        self._check(label, prediction)
        kept = label >= 0
        if not kept.any():
            return
        width = boundary_width(label.shape, self.dilation_ratio)
        label_edge = class_boundary(np.maximum(label, -1), width)[kept]
        predicted_edge = class_boundary(prediction, width)[kept]
        true, predicted = label[kept].astype(np.int64), prediction[kept].astype(np.int64)
        sizes = _sizes(true, self.classes)
        for row in range(len(_ROWS)):
            part = _pixels_of_size(true, sizes, row)
            if part is not None:
                self._count("pixels", row, true, predicted, part, part)
                edges = part & label_edge, part & predicted_edge
                self._count("boundary_pixels", row, true, predicted, *edges)
        self._arrays["images"] += 1
        self._arrays["right_images"] += _image_is_right(true, predicted)
        self._arrays["f_beta"] += f_beta(true != 0, predicted != 0)

    def scores(self) -> dict[str, float]:
        """All measures in percent; NaN where there is nothing to measure.

        `miou`, `boundary_miou`: IoU of a class over all images' pixels, mean over classes; over the
            pixels on the boundary of the class (`class_boundary`) in the two maps.
        `miou_{small, medium_small, medium_large, large}`, `boundary_miou_…`: the same over the
            pixels of background and of the classes of that size in their image: up to 5, 25, 50 and
            100% of the pixels that are not ignored; over the images that have such classes.
        `f_beta`: of foreground against background, mean over images.
        `image_accuracy`: share of images whose most frequent predicted foreground class (the first,
            where several are) is in the truth; wrong where no foreground is predicted.
        """
        scores = {}
        for row, suffix in enumerate(_ROWS):
            scores[f"miou{suffix}"] = _mean_iou(self._arrays["pixels"][row])
            scores[f"boundary_miou{suffix}"] = _mean_iou(self._arrays["boundary_pixels"][row])
        images = int(self._arrays["images"][0])
        for name, total in (("f_beta", "f_beta"), ("image_accuracy", "right_images")):
            mean = float(self._arrays[total][0]) / images if images else float("nan")
            scores[name] = 100 * mean
        return scores

    def _count(
        self,
        name: str,
        row: int,
        true: NDArray[np.int64],
        predicted: NDArray[np.int64],
        true_kept: Mask,
        predicted_kept: Mask,
    ) -> None:
        both = true_kept & predicted_kept & (true == predicted)
        with_class = predicted_kept & (predicted >= 0)
        for column, classes in enumerate((true[both], true[true_kept], predicted[with_class])):
            self._arrays[name][row, column] += np.bincount(classes, minlength=self.classes)

    def _check(self, label: Integers, prediction: Integers) -> None:
        if label.shape != prediction.shape or label.ndim != 2:
            raise InputError(
                f"a prediction of {prediction.shape} pixels cannot be compared with a label of "
                f"{label.shape}; give maps [H, W] of the label's size"
            )
        for name, values in (("label", label), ("prediction", prediction)):
            if values.size and values.max() >= self.classes:
                raise InputError(
                    f"a {name} has the class {values.max()}; with {self.classes} classes the "
                    f"largest is {self.classes - 1}"
                )
        if prediction.size and prediction.min() < -1:
            raise InputError(f"a prediction has the class {prediction.min()}; −1 means no class")


def boundary_width(shape: tuple[int, ...], dilation_ratio: float) -> int:
    """Width in pixels of the boundary in an image of H × W pixels, 1 at least."""
    return max(1, round(dilation_ratio * math.hypot(*shape)))


def class_boundary(classes: Integers, width: int) -> Mask:
    """The inner boundary of all classes' regions, bool [H, W], for a map of classes [H, W].

    A pixel is on it if a pixel of another value, or the outside of the image, is within `width`
    rows and columns: what `width` erosions of its region by a 3×3 square take away (Cheng et al.,
    "Boundary IoU", CVPR 2021). A pixel's window holds another value exactly if its largest and
    smallest differ, so that one pass does for all classes.
    """
    padded = np.pad(classes.astype(np.int32), width, constant_values=_OUTSIDE)
    size = 2 * width + 1
    differ = maximum_filter(padded, size) != minimum_filter(padded, size)
    found: Mask = differ[width:-width, width:-width]
    return found


def f_beta(truth: Mask, prediction: Mask, beta_squared: float = BETA_SQUARED) -> float:
    """(1 + β²)·precision·recall / (β²·precision + recall) in [0, 1], of masks of one shape.

    0 where either is empty, also where both are.
    """
    right = np.count_nonzero(truth & prediction)
    if right == 0:
        return 0.0
    predicted, true = np.count_nonzero(prediction), np.count_nonzero(truth)
    return (1 + beta_squared) * right / (beta_squared * true + predicted)


def _sizes(true: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Row of each class's size in this image, int64 [C]; 0 for background and absent classes."""
    counts = np.bincount(true, minlength=classes)
    # whole numbers, so that a class of exactly 5% is small whatever the rounding of floats
    limits = np.array(LARGEST_PERCENT[:-1]) * len(true)
    rows = 1 + np.searchsorted(limits, 100 * counts).astype(np.int64)
    rows[counts == 0] = 0
    rows[0] = 0
    return rows


def _pixels_of_size(true: NDArray[np.int64], sizes: NDArray[np.int64], row: int) -> Mask | None:
    """The pixels of background and of the classes of a size; None where the image has none."""
    if row == 0:
        return np.ones_like(true, bool)
    if not (sizes == row).any():
        return None
    chosen: Mask = (true == 0) | (sizes[true] == row)
    return chosen


def _image_is_right(true: NDArray[np.int64], predicted: NDArray[np.int64]) -> bool:
    objects = predicted[predicted > 0]
    return objects.size > 0 and bool((true == np.bincount(objects).argmax()).any())


def _mean_iou(counts: State) -> float:
    """Mean in percent of intersection over union over the classes of the truth; counts [3, C]."""
    both, true, predicted = counts
    present = true > 0
    if not present.any():
        return float("nan")
    return 100 * float((both[present] / (true + predicted - both)[present]).mean())
