"""Augmentation parameters of the two views: a pure function of (seed, epoch, position, size).

The recipe is MaskContrast's (Van Gansbeke et al., ICCV 2021, section 4.1): random resized crop,
colour jitter, grayscale, flip; a crop whose mask covers too little or too much is drawn again.
Nothing is drawn anywhere else; both loaders only apply what stands here.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from data_pipeline.order import generator
from data_pipeline.sample import IGNORE, MAX_PROPOSAL, UInt8

_VIEWS = 4  # stream of the generator, after those of order.py

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision and DALI


@dataclass(frozen=True)
class ViewConfig:
    """How views are drawn.

    Attributes:
        image_size: side S of the square views, pixels.
        min_scale, max_scale: share of the image's area that a crop takes.
        min_ratio, max_ratio: width / height of a crop.
        candidates: crops drawn for a view; the first whose mask coverage is valid is taken.
        min_coverage, max_coverage: valid share of a crop's pixels inside object masks.
        jitter_probability, brightness, contrast, saturation, hue: colour jitter; factors are
            uniform in [1 − x, 1 + x], hue in [−x, x] turns.
        grayscale_probability, flip_probability: of each view.
    """

    image_size: int = 224
    min_scale: float = 0.2
    max_scale: float = 1.0
    min_ratio: float = 3 / 4
    max_ratio: float = 4 / 3
    candidates: int = 16
    min_coverage: float = 0.01
    max_coverage: float = 0.99
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale_probability: float = 0.2
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        if not 8 <= self.image_size <= 4096:
            raise InputError(f"views.image_size is {self.image_size}; expected 8…4096 pixels")
        if self.candidates < 1:
            raise InputError(f"views.candidates is {self.candidates}; need at least 1")
        for low, high in (("min_scale", "max_scale"), ("min_ratio", "max_ratio")):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise InputError(f"views.{low} must be above 0 and at most views.{high}")
        if self.max_scale > 1:
            raise InputError(f"views.max_scale is {self.max_scale}; a crop is at most the image: 1")
        if not 0 <= self.min_coverage < self.max_coverage <= 1:
            raise InputError("views.min_coverage must be below views.max_coverage, both in 0…1")
        for name in ("jitter_probability", "grayscale_probability", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"views.{name} is {getattr(self, name)}; expected 0…1")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"views.{name} is {getattr(self, name)}; expected 0…1")
        if not 0 <= self.hue <= 0.5:
            raise InputError(f"views.hue is {self.hue}; expected 0…0.5 turns")


@dataclass(frozen=True)
class View:
    """Everything drawn for one view of one image.

    Attributes:
        windows: int32 [n, 4], candidate crops (top, left, height, width), pixels; n ≥ 1.
        brightness, contrast, saturation: factors; saturation 0 is grayscale.
        hue: degrees.
        flip: whether the view is mirrored.
    """

    windows: NDArray[np.int32]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    flip: bool


def draw_views(
    seed: int, epoch: int, position: int, height: int, width: int, config: ViewConfig
) -> tuple[View, View]:
    """The query and the key view of the sample at `position` of `epoch`, an image of that size."""
    # as many draws for every view, whatever comes out
    crops = 4 * config.candidates
    uniform = generator(seed, _VIEWS, epoch, position).random((2, crops + 7))
    windows = _draw_windows(uniform[:, :crops].reshape(2, -1, 4), height, width, config)
    query, key = map(partial(_make_view, config), windows, uniform[:, crops:].tolist())
    return query, key


def choose_window(mask: UInt8, view: View, config: ViewConfig) -> tuple[NDArray[np.int32], bool]:
    """The first candidate window of valid coverage, and whether there was one.

    Args:
        mask: uint8 [H, W], proposal ids; ignored pixels count as background.
        view: its candidates are tried in order; the last is taken when none is valid.
        config: what is valid.
    """
    for window in view.windows:
        top, left, height, width = window.tolist()
        crop = mask[top : top + height, left : left + width]
        covered = np.count_nonzero(crop) - np.count_nonzero(crop == IGNORE)
        if config.min_coverage <= covered / (height * width) <= config.max_coverage:
            return window, True
    return view.windows[-1], False


def colour_matrix(view: View) -> tuple[NDArray[np.float64], float]:
    """Colour change as one affine map: `x ↦ M x + c · grey mean of the crop`, clamped once.

    Contrast is centred on the crop's grey mean, as torchvision's; hue turns the chrominance plane
    of YIQ and saturation scales it, as DALI's `color_twist`.

    Returns:
        M, float64 [3, 3] on RGB, and c.
    """
    angle = math.radians(view.hue)
    turn = np.array(
        [[1, 0, 0], [0, math.cos(angle), math.sin(angle)], [0, -math.sin(angle), math.cos(angle)]]
    )
    chroma = np.diag([1.0, view.saturation, view.saturation])
    matrix = _YIQ_TO_RGB @ turn @ chroma @ _RGB_TO_YIQ
    gain = view.brightness * view.contrast
    return gain * matrix, view.brightness * (1 - view.contrast)


def proposals_in(mask: UInt8) -> NDArray[np.int64]:
    """Ids of the object proposals in a mask, ascending."""
    present = np.unique(mask).astype(np.int64)
    return present[(present > 0) & (present <= MAX_PROPOSAL)]


# NTSC, the matrix of DALI's color_twist
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


def _make_view(config: ViewConfig, windows: NDArray[np.int32], uniform: list[float]) -> View:
    """A view of these windows and seven uniforms."""
    jitter, grey, flip, *factors = uniform
    brightness, contrast, saturation, hue = (2 * factor - 1 for factor in factors)
    if jitter >= config.jitter_probability:
        brightness = contrast = saturation = hue = 0.0
    return View(
        windows,
        1 + config.brightness * brightness,
        1 + config.contrast * contrast,
        0.0 if grey < config.grayscale_probability else 1 + config.saturation * saturation,
        360 * config.hue * hue,
        flip < config.flip_probability,
    )


def _draw_windows(
    uniform: NDArray[np.float64], height: int, width: int, config: ViewConfig
) -> list[NDArray[np.int32]]:
    """Random resized crops of each view from uniforms [views, n, 4], as int32 [1…n + 1, 4].

    torchvision's: what does not fit is left out, and a centre crop comes at the end.
    """
    scale = config.min_scale + (config.max_scale - config.min_scale) * uniform[..., 0]
    low, high = math.log(config.min_ratio), math.log(config.max_ratio)
    ratio = np.exp(low + (high - low) * uniform[..., 1])
    area = height * width * scale
    widths = np.maximum(1, np.rint(np.sqrt(area * ratio))).astype(np.int32)
    heights = np.maximum(1, np.rint(np.sqrt(area / ratio))).astype(np.int32)
    fits = (widths <= width) & (heights <= height)
    tops = (uniform[..., 2] * (height - heights + 1)).astype(np.int32)
    lefts = (uniform[..., 3] * (width - widths + 1)).astype(np.int32)
    windows = np.stack([tops, lefts, heights, widths], -1)
    fallback = np.array([_centre_crop(height, width, config)], np.int32)
    return [np.concatenate([w[fit], fallback]) for w, fit in zip(windows, fits, strict=True)]


def _centre_crop(height: int, width: int, config: ViewConfig) -> tuple[int, int, int, int]:
    ratio = min(max(width / height, config.min_ratio), config.max_ratio)
    crop_height = min(height, max(1, round(width / ratio)))
    crop_width = min(width, max(1, round(height * ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
