"""Steps of the published evaluations, written out in plain NumPy, to compare ours with."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ONE = 2048  # OpenCV's fixed point has 11 bits


def cubic_taps(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of each of `new` pixels its four sources among `old` and their weights, [new, 4] each."""
    position = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(position).astype(np.int64)
    distance = np.abs(position[:, None] - (first[:, None] + np.arange(-1, 3)))
    a = -0.75
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    sources = (first[:, None] + np.arange(-1, 3)).clip(0, old - 1)  # the border is continued
    return sources, np.where(distance <= 1, near, far)


def opencv_cubic(image: NDArray[np.uint8], height: int, width: int, fixed: bool) -> Any:
    """INTER_CUBIC of uint8 [H, W, C]: uint8 [height, width, C].

    `fixed`: weights rounded to 11 bits, as its own code has them; else as its x86 packages do it
    (Intel's IPP), in floating point.
    """
    rows, by_row = cubic_taps(image.shape[0], height)
    columns, by_column = cubic_taps(image.shape[1], width)
    if fixed:
        by_row, by_column = np.rint(by_row * _ONE), np.rint(by_column * _ONE)
    wide = sum(image[:, columns[:, k]] * by_column[:, k, None] for k in range(4))
    total: Any = sum(wide[rows[:, k]] * by_row[:, k, None, None] for k in range(4))
    rounded = np.floor(total / _ONE**2 + 0.5) if fixed else np.rint(total)
    return rounded.clip(0, 255).astype(np.uint8)


def opencv_nearest(values: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """INTER_NEAREST of [H, W]: [height, width]."""
    result = np.zeros((height, width), values.dtype)
    for i in range(height):
        for j in range(width):
            result[i, j] = values[
                nearest(i, len(values), height), nearest(j, len(values[0]), width)
            ]
    return result


def nearest(index: int, old: int, new: int) -> int:
    """The pixel of `old` that pixel `index` of `new` takes; divided twice, as OpenCV does."""
    return min(int(index * (1 / (new / old))), old - 1)
