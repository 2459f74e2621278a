"""Saliency without weights: what is not connected to the border of the picture, and stands out.

Superpixels of one colour that hold much of the picture's border for their size are background;
contrast against the background is foreground; a quadratic energy joins both (Zhu, Liang, Wei, Sun:
"Saliency Optimization from Robust Background Detection", CVPR 2014; sections and equations below
are theirs). The map that results is then made finer, which is not in the paper: colours of
foreground and background, weighted by it, decide over smaller superpixels with the same energy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse import csgraph, linalg
from skimage.color import rgb2lab
from skimage.segmentation import slic

from data_pipeline.masks.postprocess import otsu_threshold
from data_pipeline.masks.predictor import Float32, UInt8

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

COMPACTNESS = 20.0  # of superpixels, as in the authors' published code
SIGMA_COLOUR = 10.0  # σ_clr, in CIE-Lab units (section 3.2)
SIGMA_BOUNDARY = 1.0  # σ_bndCon (section 4.1)
SIGMA_SPACE = 0.25  # σ_spa, in sides of the picture (section 4.1)
SMOOTHNESS = 0.1  # μ (section 4.2)
NOTICEABLE = 2.3  # CIE-Lab units: a smaller difference of two colours is not seen (Mahy, 1994)
COLOUR_BINS = 16  # a Lab axis, of the colour model
TINY = 1e-9


@dataclass(frozen=True)
class PriorConfig:
    """What decides the maps of `BackgroundPrior`.

    Attributes:
        size: longest side, in pixels, that a picture is worked on at; larger ones are reduced.
        superpixels: about how many the background prior works on (section 3.2: about 200).
        fine_superpixels: about how many the refinement works on; 0 leaves it out.
        rounds: times that the colour model and the map are made from each other.
    """

    size: int = 320
    superpixels: int = 200
    fine_superpixels: int = 800
    rounds: int = 3


class BackgroundPrior:
    """Saliency from the background prior; a `Predictor`."""

    batch_size = 1

    def __init__(self, config: PriorConfig | None = None) -> None:
        self.config = config or PriorConfig()
        chosen = self.config
        parts = (chosen.size, chosen.superpixels, chosen.fine_superpixels, chosen.rounds)
        self.name = "prior-1-" + "-".join(map(str, parts))  # 1: of the method as it is here

    def predict(self, images: Sequence[UInt8]) -> list[Float32]:
        """Saliency in [0, 1], float32 [H, W], of each picture uint8 [H, W, 3]."""
        return [predict_saliency(image, self.config) for image in images]


def predict_saliency(image: UInt8, config: PriorConfig) -> Float32:
    """Saliency in [0, 1], float32 [H, W], of one RGB picture uint8 [H, W, 3] of any size.

    A picture in which nothing stands out gets zeros.
    """
    height, width = image.shape[:2]
    lab = rgb2lab(_reduce(image, config.size))
    coarse = _Superpixels.of(lab, config.superpixels)
    saliency = _background_saliency(coarse)
    pixels = saliency[coarse.labels]
    if config.fine_superpixels and saliency.any():
        fine = _Superpixels.of(lab, config.fine_superpixels)
        for _ in range(config.rounds):
            pixels = _refine(lab, fine, pixels)
    full = Image.fromarray(pixels.astype(np.float32)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    return np.asarray(np.clip(np.asarray(full), 0, 1), np.float32)


@dataclass(frozen=True)
class _Superpixels:
    """A picture as a graph of regions of one colour.

    Attributes:
        labels: region of each pixel, [H, W].
        colours: mean CIE-Lab, [N, 3].
        centres: mean place, row and column in [0, 1], [N, 2].
        sizes: pixels, [N].
        border: whether the region touches the picture's border, [N].
        pairs: regions that touch each other, first < second, [E, 2].
    """

    labels: Int64
    colours: Float64
    centres: Float64
    sizes: Float64
    border: NDArray[np.bool_]
    pairs: Int64

    @classmethod
    def of(cls, lab: Float64, count: int) -> _Superpixels:
        """SLIC superpixels, about `count` of them, of a picture in CIE-Lab [H, W, 3]."""
        height, width = lab.shape[:2]
        span = max(float(lab.max() - lab.min()), 1.0)  # slic brings its input to [0, 1]
        found = slic(
            lab,
            n_segments=count,
            compactness=COMPACTNESS / span,
            max_num_iter=10,
            convert2lab=False,
            start_label=0,
        )
        labels = np.unique(found, return_inverse=True)[1].reshape(height, width).astype(np.int64)
        sizes = np.bincount(labels.ravel()).astype(np.float64)
        colours = np.stack([_sums(labels, lab[..., i]) / sizes for i in range(3)], 1)
        rows, columns = np.mgrid[:height, :width]
        rows, columns = (rows + 0.5) / height, (columns + 0.5) / width
        centres = np.stack([_sums(labels, rows) / sizes, _sums(labels, columns) / sizes], 1)
        border = np.zeros(len(sizes), bool)
        for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
            border[edge] = True
        return cls(labels, colours, centres, sizes, border, _touching(labels))

    def mean(self, values: Float64) -> Float64:
        """Mean of pixel values [H, W] over each region, [N]."""
        return _sums(self.labels, values) / self.sizes


def _background_saliency(regions: _Superpixels) -> Float64:
    """Saliency in [0, 1] of each region, [N]: zeros where nothing stands out."""
    colours = regions.colours
    distance = np.sqrt(np.maximum(((colours[:, None] - colours[None]) ** 2).sum(2), 0))
    if distance.max() < NOTICEABLE:
        return np.zeros(len(colours))
    boundary = _boundary_connectivity(regions, distance)
    background = 1 - np.exp(-(boundary**2) / (2 * SIGMA_BOUNDARY**2))  # equation 6
    gap = ((regions.centres[:, None] - regions.centres[None]) ** 2).sum(2)
    near = np.exp(-gap / (2 * SIGMA_SPACE**2))
    contrast = (distance * near) @ background  # equation 7
    foreground = _stretch(contrast)
    if not foreground.any():
        return foreground
    foreground[foreground < otsu_threshold(foreground)] = 0  # as the authors' published code does
    first, second = _linked(regions)
    similar = np.exp(-(distance[first, second] ** 2) / (2 * SIGMA_COLOUR**2)) + SMOOTHNESS
    return _stretch(_optimise(background, foreground, first, second, similar))


def _boundary_connectivity(regions: _Superpixels, distance: Float64) -> Float64:
    """How much of a region's soft surroundings of one colour is picture border, [N] (equation 5).

    Geodesic distances run over the graph of touching regions in which all those at the border touch
    each other, so that background that an object cuts in two is still one. Steps smaller than the
    usual one between a region and its most similar neighbour count nothing, or else they would add
    up over a plain ground (authors' published code).
    """
    first, second = _linked(regions)
    steps = distance[first, second]
    count = len(regions.sizes)
    nearest = np.full(count, np.inf)
    np.minimum.at(nearest, first, steps)
    np.minimum.at(nearest, second, steps)
    usual = float(nearest[np.isfinite(nearest)].mean()) if len(steps) else 0.0
    # a sparse graph takes a zero for no edge
    weights = np.maximum(steps - usual, 0) + TINY
    graph = sparse.csr_array((weights, (first, second)), shape=(count, count))
    geodesic = csgraph.dijkstra(graph, directed=False)
    near = np.exp(-(geodesic**2) / (2 * SIGMA_COLOUR**2))  # equation 3
    area = near.sum(1)
    length = near[:, regions.border].sum(1)  # equation 4
    return np.asarray(length / np.sqrt(area))


def _refine(lab: Float64, regions: _Superpixels, saliency: Float64) -> Float64:
    """Saliency of pixels [H, W] from that of larger regions: colours decide, smoothly.

    Soft histograms of the colours of foreground and background, each weighted by the map so far,
    give every pixel a posterior; regions take its mean, and the energy of section 4.2 smooths it.
    """
    posterior = _colour_posterior(lab, saliency)
    prior = regions.mean(saliency)
    likely = regions.mean(posterior)
    foreground = prior * likely
    background = (1 - prior) * (1 - likely)
    first, second = regions.pairs.T
    gap = ((regions.colours[first] - regions.colours[second]) ** 2).sum(1)
    similar = np.exp(-gap / (2 * SIGMA_COLOUR**2)) + SMOOTHNESS
    smooth = _optimise(background, foreground, first, second, similar)
    return _stretch(smooth)[regions.labels]


def _colour_posterior(lab: Float64, saliency: Float64) -> Float64:
    """Probability of foreground given a pixel's colour alone, [H, W], equal priors."""
    low, high = lab.min((0, 1)), lab.max((0, 1))
    span = np.maximum(high - low, COLOUR_BINS * NOTICEABLE)  # finer bins would hold noise
    bins = np.minimum(((lab - low) / span * COLOUR_BINS).astype(np.int64), COLOUR_BINS - 1)
    index = (bins[..., 0] * COLOUR_BINS + bins[..., 1]) * COLOUR_BINS + bins[..., 2]
    shape, total = (COLOUR_BINS,) * 3, COLOUR_BINS**3
    densities = []
    for weight in (saliency, 1 - saliency):
        counts = np.bincount(index.ravel(), weight.ravel(), total).reshape(shape)
        counts = ndimage.gaussian_filter(counts, 1.0, mode="constant")
        densities.append(counts / max(counts.sum(), TINY) + 1e-6)
    foreground, background = densities
    return np.asarray((foreground / (foreground + background)).ravel()[index])


def _optimise(
    background: Float64, foreground: Float64, first: Int64, second: Int64, similar: Float64
) -> Float64:
    """The s that minimises Σ w_bg s² + Σ w_fg (s - 1)² + Σ w_ij (s_i - s_j)² (equation 9), [N]."""
    count = len(background)
    weights = sparse.csr_array((similar, (first, second)), shape=(count, count))
    weights = weights + weights.T
    diagonal = background + foreground + weights.sum(1) + TINY
    system = sparse.csc_array(sparse.diags_array(diagonal) - weights)
    return np.asarray(linalg.spsolve(system, foreground)).reshape(count)


def _linked(regions: _Superpixels) -> tuple[Int64, Int64]:
    """Regions that touch, and all pairs of those at the border, each pair once."""
    edge = np.flatnonzero(regions.border)
    first, second = np.triu_indices(len(edge), 1)
    both = np.concatenate([regions.pairs, np.stack([edge[first], edge[second]], 1)])
    unique = np.unique(both, axis=0)
    return unique[:, 0], unique[:, 1]


def _touching(labels: Int64) -> Int64:
    """Pairs of labels that are neighbours in a row or column, smaller first, each once, [E, 2]."""
    across = np.stack([labels[:, :-1].ravel(), labels[:, 1:].ravel()], 1)
    down = np.stack([labels[:-1].ravel(), labels[1:].ravel()], 1)
    pairs = np.concatenate([across, down])
    pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
    return np.unique(pairs, axis=0).reshape(-1, 2)


def _sums(labels: Int64, values: Float64) -> Float64:
    return np.asarray(np.bincount(labels.ravel(), values.ravel()), np.float64)


def _stretch(values: Float64) -> Float64:
    """`values` brought to [0, 1]; zeros where they are all alike."""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-6:
        return np.zeros_like(values)
    return (values - low) / (high - low)


def _reduce(image: UInt8, longest: int) -> UInt8:
    """The picture with no side above `longest` pixels."""
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
