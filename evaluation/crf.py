"""Fully connected CRF over class probabilities (Krähenbühl and Koltun, Efficient Inference in Fully
Connected CRFs with Gaussian Edge Potentials, NIPS 2011)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, diags

from data_pipeline.errors import InputError
from evaluation.permutohedral import Permutohedral

Float32 = NDArray[np.float32]
_Filter = Callable[[Float32], Float32]  # [H·W, k] → [H·W, k], times the kernel's weight

_LEAST = 1e-5  # probability; what is certain could never be corrected
_BLOCK_BYTES = 2**26  # of lattice values that are filtered at once
_REACH = 5.3  # standard deviations, beyond which the Gaussian is below 1e-6


@dataclass(frozen=True)
class CrfConfig:
    """The two kernels; the defaults are the recipe of the published results.

    Attributes:
        iterations: of mean field.
        gaussian_weight, gaussian_sigma: smoothness kernel; sigma in pixels. Weight 0 leaves it out.
        bilateral_weight, bilateral_sigma, colour_sigma: appearance kernel; sigmas in pixels and in
            grey levels of 0…255. Weight 0 leaves it out.
    """

    iterations: int = 10
    gaussian_weight: float = 3.0
    gaussian_sigma: float = 1.0
    bilateral_weight: float = 4.0
    bilateral_sigma: float = 67.0
    colour_sigma: float = 3.0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise InputError(f"iterations of the CRF is {self.iterations}; it must be at least 1")
        for name in ("gaussian_weight", "bilateral_weight"):
            self._require_between(name, 0, 1e6)
        for name in ("gaussian_sigma", "bilateral_sigma", "colour_sigma"):
            self._require_between(name, 0.01, 1e6)

    def _require_between(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not low <= value <= high:
            raise InputError(f"{name} of the CRF is {value}; it must be from {low:g} to {high:g}")


def refine(
    image: NDArray[np.uint8], probabilities: Float32, config: CrfConfig | None = None
) -> Float32:
    """Probabilities after mean field with Potts compatibility.

    A pixel hears from itself too, as in the published implementation, and kernels K are normalised
    symmetrically: D^-½ K D^-½ with D = K·1. The Gaussian kernel is exact to 1e-6; the bilateral one
    is the permutohedral lattice's approximation. Memory beyond result and argument does not grow
    with the number of classes, and the same arguments give the same bits.

    Args:
        image: uint8 [H, W, 3].
        probabilities: float32 [C, H, W], in 0…1; read as at least 1e-5, so nothing is certain.
        config: kernels and iterations.

    Returns:
        float32 [C, H, W], sum 1 at each pixel.

    Raises:
        InputError: shapes that do not fit, values that are no probabilities, or sigmas so small
            for this image that the lattice cannot be numbered.
    """
    config = config or CrfConfig()
    _require_fit(image, probabilities)
    classes, height, width = probabilities.shape
    given = np.asarray(probabilities, np.float32).reshape(classes, height * width)
    beliefs = np.clip(given, _LEAST, 1)
    beliefs /= beliefs.sum(0)
    filters, widest = _filters(image, config)
    if not filters:
        return beliefs.reshape(classes, height, width)
    size = max(1, _BLOCK_BYTES // (4 * widest))
    for _ in range(config.iterations):
        for first in range(0, classes, size):
            block = beliefs[first : first + size]
            _to_logits(block, given[first : first + size], filters)
        _softmax(beliefs)
    return beliefs.reshape(classes, height, width)


def _require_fit(image: NDArray[np.uint8], probabilities: Float32) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise InputError(
            f"the CRF's image is {image.dtype} {list(image.shape)}; it must be uint8 [H, W, 3]"
        )
    shape = probabilities.shape
    if len(shape) != 3 or shape[0] < 1 or shape[1:] != image.shape[:2]:
        raise InputError(
            f"the CRF's probabilities are {list(shape)} for an image of {list(image.shape[:2])}; "
            "they must be [C, H, W] of its size"
        )
    if not (probabilities.min() >= 0 and probabilities.max() <= 1 + 1e-3):
        raise InputError(
            "the CRF got values that are not probabilities (below 0, above 1 or not a number); "
            "apply softmax to logits"
        )


def _filters(image: NDArray[np.uint8], config: CrfConfig) -> tuple[list[_Filter], int]:
    """The kernels of weight above 0, and the most values that one holds for a class."""
    height, width, _ = image.shape
    filters: list[_Filter] = []
    widest = height * width
    if config.gaussian_weight:
        filters.append(_gaussian(height, width, config))
    if config.bilateral_weight:
        lattice = _bilateral(image, config)
        filters.append(lattice.filter)
        widest = max(widest, lattice.vertices)
    return filters, widest


def _gaussian(height: int, width: int, config: CrfConfig) -> _Filter:
    """The smoothness kernel, exact: it is separable, and its normalisation is, too.

    With a sigma of a pixel, a lattice would have more vertices than there are pixels, so it would
    cost more than these few neighbours and be wrong by more.
    """
    vertical = _band(height, config.gaussian_sigma) * np.float32(config.gaussian_weight)
    horizontal = _band(width, config.gaussian_sigma)

    def smooth(values: Float32) -> Float32:
        rows = (vertical @ values.reshape(height, -1)).reshape(height, width, -1)
        for row in rows:
            row[:] = horizontal @ row
        smoothed: Float32 = rows.reshape(values.shape)
        return smoothed

    return smooth


def _band(length: int, sigma: float) -> csr_matrix:
    """One axis of the Gaussian, normalised symmetrically: float32 [length, length]."""
    reach = min(math.ceil(_REACH * sigma), length - 1)
    offsets = np.arange(-reach, reach + 1)
    band = diags(np.exp(-0.5 * (offsets / sigma) ** 2), offsets, (length, length), dtype=np.float64)
    norm = diags(np.asarray(band.sum(1)).ravel() ** -0.5)
    return (norm @ band @ norm).tocsr().astype(np.float32)


def _bilateral(image: NDArray[np.uint8], config: CrfConfig) -> Permutohedral:
    """The appearance kernel over position and colour."""
    height, width, _ = image.shape
    points = np.empty((5, height, width))
    points[0] = np.arange(width) / config.bilateral_sigma
    points[1] = np.arange(height)[:, None] / config.bilateral_sigma
    points[2:] = image.transpose(2, 0, 1) / config.colour_sigma
    try:
        lattice = Permutohedral(points.reshape(5, -1))
    except OverflowError as error:
        raise InputError(
            f"bilateral_sigma {config.bilateral_sigma} and colour_sigma {config.colour_sigma} "
            f"of the CRF are too small for an image of {height} × {width} pixels; raise them, or "
            "leave the kernel out with bilateral_weight 0"
        ) from error
    ones = np.ones((height * width, 1), np.float32)
    lattice.scale(np.sqrt(np.float32(config.bilateral_weight) / lattice.filter(ones)[:, 0]))
    return lattice


def _to_logits(block: Float32, given: Float32, filters: list[_Filter]) -> None:
    """Beliefs [k, n] of some classes → their logits, in place: unary and messages."""
    values = np.ascontiguousarray(block.T)
    messages = filters[0](values)
    for kernel in filters[1:]:
        messages += kernel(values)
    np.clip(given, _LEAST, 1, out=block)
    np.log(block, out=block)
    block += messages.T


def _softmax(logits: Float32) -> None:
    """Over classes, [C, n], in place."""
    logits -= logits.max(0)
    np.exp(logits, out=logits)
    logits /= logits.sum(0)
