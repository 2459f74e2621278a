"""Region similarity J and boundary accuracy F of video object segmentation, as DAVIS-2016 has them.

Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation",
CVPR 2016, section 4, and what its evaluation code adds where the paper is silent.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from data_pipeline.errors import InputError

Mask = NDArray[np.bool_]
Values = NDArray[np.float64]
FrameSet = Literal["inner", "all"]

TOLERANCE = 0.008  # of the image diagonal, between boundaries that match
_BINS = 4  # of a sequence, for the decay


def region_similarity(truth: Mask, prediction: Mask, void: Mask | None = None) -> float:
    """J: intersection over union in [0, 1] of two masks, bool [H, W]; 1 where both are empty.

    Pixels of `void` are left out of both.
    """
    if void is not None:
        truth, prediction = truth & ~void, prediction & ~void
    union = np.count_nonzero(truth | prediction)
    return np.count_nonzero(truth & prediction) / union if union else 1.0


def boundary_f_measure(
    truth: Mask, prediction: Mask, void: Mask | None = None, tolerance: float = TOLERANCE
) -> float:
    """F in [0, 1]: harmonic mean of precision and recall of the mask's boundary pixels.

    A boundary pixel is right where the other mask has one within the tolerance, that is, under
    its boundary dilated by a disk.

    Args:
        truth, prediction: bool [H, W].
        void: left out. As in the evaluation code of DAVIS-2017 (the data of 2016 have none) these
            pixels are background in both masks, so that an object ends where they begin.
        tolerance: share of the image diagonal, rounded up to whole pixels; pixels from 1 on.

    Returns:
        1 where neither mask has a boundary, 0 where one of them has none.
    """
    if void is not None:
        truth, prediction = truth & ~void, prediction & ~void
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*truth.shape))
    true_points = np.argwhere(mask_boundary(truth))
    predicted_points = np.argwhere(mask_boundary(prediction))
    if len(true_points) == 0 or len(predicted_points) == 0:
        return float(len(true_points) == len(predicted_points))
    precision = _share_within(predicted_points, true_points, radius)
    recall = _share_within(true_points, predicted_points, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mask_boundary(mask: Mask) -> Mask:
    """Boundary one pixel wide, bool [H, W] (Martin's seg2bmap, which DAVIS uses).

    A pixel is on it if it differs from its neighbour to the east, south or south-east; so it lies
    half a pixel towards the origin. The border of the image is none.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    east, south, south_east = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    found: Mask = (mask != east) | (mask != south) | (mask != south_east)
    return found


def _share_within(points: NDArray[np.int64], others: NDArray[np.int64], radius: float) -> float:
    """Share of points [N, 2] that have one of the others [M, 2] within the radius."""
    distances, _ = cKDTree(others).query(points, distance_upper_bound=radius + 0.5)
    return float(np.mean(distances <= radius))


def frame_measures(label: NDArray[np.integer[Any]], prediction: NDArray[Any]) -> Values:
    """J and F of one frame, [2] in [0, 1]; all objects are one, as in DAVIS-2016.

    Args:
        label: [H, W], 0 background, above it objects, negative ignored.
        prediction: [H, W], above 0 (or True) where it sees an object.
    """
    if label.shape != prediction.shape:
        raise InputError(
            f"a prediction of {prediction.shape} pixels cannot be compared with a label of "
            f"{label.shape}; bring it to the label's size first"
        )
    truth, predicted, void = label > 0, prediction > 0, label < 0
    ignored = void if void.any() else None
    return np.array(
        [
            region_similarity(truth, predicted, ignored),
            boundary_f_measure(truth, predicted, ignored),
        ]
    )


@dataclass(frozen=True)
class Statistics:
    """Of the values of one measure over the frames of one sequence, in the unit of the values.

    Attributes:
        mean: over the frames.
        recall: share of the frames above .5.
        decay: mean of the first quarter of the frames minus that of the last.
    """

    mean: float
    recall: float
    decay: float


def sequence_statistics(values: Values) -> Statistics:
    """Statistics of values [T] of a measure, T ≥ 1.

    The quarters' borders are the frames at round(linspace(1, T, 5)), halves up, as in the official
    code; a border frame is in the quarters on both sides of it.
    """
    borders = np.floor(np.linspace(1, len(values), _BINS + 1) + 0.5 + 1e-10).astype(np.int64) - 1
    first, last = values[borders[0] : borders[1] + 1], values[borders[-2] : borders[-1] + 1]
    decay = float(first.mean() - last.mean())
    return Statistics(float(values.mean()), float(np.mean(values > 0.5)), decay)


def by_sequence(keys: Sequence[str], values: Values) -> dict[str, Values]:
    """Measures [N, 2] of frames with keys `SEQUENCE/FRAME`, put in order: [T, 2] a sequence.

    Frames are ordered by their names, which DAVIS numbers with leading zeros.

    Raises:
        InputError: a key names no sequence, or occurs twice.
    """
    groups: dict[str, dict[str, Values]] = defaultdict(dict)
    for key, measured in zip(keys, values, strict=True):
        sequence, slash, frame = key.rpartition("/")
        if not slash or not sequence:
            raise InputError(f"the key {key} names no sequence; keys of frames are SEQUENCE/00000")
        if frame in groups[sequence]:
            raise InputError(f"the frame {key} occurs twice; score a data set without duplicates")
        groups[sequence][frame] = measured
    return {
        sequence: np.stack([frames[frame] for frame in sorted(frames)])
        for sequence, frames in sorted(groups.items())
    }


def sequence_scores(
    sequence: str, measures: Values, frames: FrameSet = "inner"
) -> dict[str, float]:
    """Scores of one sequence in percent: `{j,f}_{mean,recall,decay}` and `jf_mean`.

    Args:
        sequence: its name, for messages.
        measures: J and F of all its frames in order, [T, 2] in [0, 1].
        frames: see `davis_scores`.

    Raises:
        InputError: the frame set is empty, or a value is no number.
    """
    chosen = measures[1:-1] if frames == "inner" else measures
    if len(chosen) == 0:
        raise InputError(
            f"the sequence {sequence} has {len(measures)} frames, and the first and last of a "
            "sequence do not count; it takes three or more, or the frame set 'all'"
        )
    if not np.isfinite(chosen).all():
        raise InputError(f"frames of the sequence {sequence} have no J or F; measure all of them")
    scores = {}
    for column, name in enumerate("jf"):
        found = sequence_statistics(chosen[:, column])
        scores[f"{name}_mean"] = 100 * found.mean
        scores[f"{name}_recall"] = 100 * found.recall
        scores[f"{name}_decay"] = 100 * found.decay
    scores["jf_mean"] = (scores["j_mean"] + scores["f_mean"]) / 2
    return scores


def davis_scores(sequences: Mapping[str, Values], frames: FrameSet = "inner") -> dict[str, float]:
    """Scores of a data set in percent.

    `{j,f}_{mean,recall,decay}` are means over the sequences of the statistics over each one's
    frames, and `jf_mean` is the mean of `j_mean` and `f_mean`: the official figures.
    `{j,f,jf}_mean_over_frames` weigh each frame the same instead, so that long sequences count for
    more.

    Args:
        sequences: J and F of each sequence's frames in order, [T, 2] in [0, 1].
        frames: "inner" leaves out the first and the last frame of each sequence, as the official
            evaluation of DAVIS-2016 does for every method, and that of DAVIS-2017 for methods that
            are given the first mask. "all" takes every frame; a first frame whose mask was given
            then counts as perfect.

    Raises:
        InputError: there is no sequence, a frame set is empty, or a value is no number.
    """
    if not sequences:
        raise InputError("there is no sequence to score; give the frames of one at least")
    each = [sequence_scores(name, measures, frames) for name, measures in sequences.items()]
    scores = {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}
    inner = slice(1, -1) if frames == "inner" else slice(None)
    over_frames = np.concatenate([measures[inner] for measures in sequences.values()]).mean(0)
    scores["j_mean_over_frames"] = 100 * float(over_frames[0])
    scores["f_mean_over_frames"] = 100 * float(over_frames[1])
    scores["jf_mean_over_frames"] = 100 * float(over_frames.mean())
    return scores
